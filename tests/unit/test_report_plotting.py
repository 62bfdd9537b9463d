"""Matplotlib's import: silent and without traces, whatever the user's home, configuration and fonts."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

_PROGRAM = """
import os, sys
sys.argv = ["/usr/bin/doccls", "report"]
before = dict(os.environ)
from doccls.report.plotting import Figure, mpl
assert os.environ == before
with mpl.rc_context():
    mpl.rcdefaults()
    Figure().add_subplot().set_title("x")
"""

_HOST = """
import sys
from pathlib import Path
sys.argv = ["notebook.py"]
FIRST
from doccls.report.figures import _drawing
with _drawing("x") as (axes, render):
    axes.plot([1, 2])
    plot = render()
import matplotlib
assert matplotlib.rcParams["lines.linewidth"] == 7
assert matplotlib.get_configdir() == sys.path[-1] and matplotlib.get_backend() == "pdf"
assert "matplotlib.pyplot" not in sys.modules
Path("plot").write_text(plot)
"""

# Older versions of Matplotlib ask for the machine's fonts, whatever the environment says.
_HIDES_FONTS = tuple(map(int, version("matplotlib").split(".")[:2])) >= (3, 11)


def test_import_needs_no_home_and_leaves_no_trace(tmp_path: Path) -> None:
    """Nobody can make a folder in a file; `fc-list`, which lists the machine's fonts, must not be asked."""
    (home := tmp_path / "home").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "matplotlibrc").write_text("no.such.key: 1\n")
    (tmp_path / "fc-list").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    (tmp_path / "fc-list").chmod(0o755)
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = kept | {
        "HOME": str(home),
        "MATPLOTLIBRC": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if _HIDES_FONTS:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not (tmp_path / "asked").exists()
    assert done.returncode == 0 and list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("first", ["", "import matplotlib"])
def test_program_that_calls_doccls_keeps_its_own_settings(tmp_path: Path, first: str) -> None:
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\n")
    plots = []
    for program in (
        f"import sys; sys.path.append({str(tmp_path)!r})\n{_HOST.replace('FIRST', first)}",
        "import sys; sys.argv = ['doccls']\n"
        "from doccls.report.figures import _drawing\n"
        "with _drawing('x') as (axes, render): axes.plot([1, 2]); open('plot', 'w').write(render())",
    ):
        environment = os.environ | {"MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "pdf"}
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, timeout=100, check=True)
        plots.append((tmp_path / "plot").read_text())
    assert plots[0] == plots[1]

"""Matplotlib's import: silent and without traces, whatever the user's home, configuration and fonts."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os
before = dict(os.environ)
from doccls.report.plotting import Figure, mpl
assert os.environ == before
with mpl.rc_context():
    mpl.rcdefaults()
    Figure().add_subplot().set_title("x")
"""


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
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "asked").exists() and list((tmp_path / "tmp").iterdir()) == []

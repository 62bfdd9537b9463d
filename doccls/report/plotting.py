"""Matplotlib, imported such that nothing of the user's has a say: neither configuration nor caches nor fonts.

Where its cache can't be written to (a read-only home folder, a user without one), Matplotlib would warn and search the
fonts of the machine in each run. The plots need only the metrics of the font that it brings along. A notebook or a
service that calls doccls may plot too, after doccls, so there it is imported as usual; the plots are the same.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from doccls.system.temporary import temporary_folder

__all__ = ["Axes", "Figure", "MaxNLocator", "mpl"]


def _is_own_process() -> bool:
    """Return whether this process was started as doccls or its launcher: by `python -m` or by the installed script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return spec.name.partition(".")[0] in ("doccls", "launcher")
    return Path(sys.argv[0]).stem in ("doccls", "doccls-launch") if sys.argv else False


@contextmanager
def _setting(**variables: str) -> Iterator[None]:
    """Set environment variables within the block."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _isolating() -> Iterator[None]:
    """Hide the user's configuration, caches and fonts from Matplotlib, which is imported in the block."""
    with (
        temporary_folder("doccls-matplotlib-") as folder,
        _setting(MPLCONFIGDIR=str(folder), MATPLOTLIBRC=os.devnull, MPL_IGNORE_SYSTEM_FONTS="1"),
    ):
        yield


with _isolating() if _is_own_process() else nullcontext():
    import matplotlib as mpl
    import matplotlib.style  # noqa: F401 (otherwise `rcdefaults` imports it, which searches the user's folder)
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

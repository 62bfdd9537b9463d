"""Matplotlib, imported such that nothing of the user's has a say: neither configuration nor caches nor fonts.

Where its cache can't be written to (a read-only home folder, a user without one), Matplotlib would warn and search the
fonts of the machine in each run. The plots need only the metrics of the font that it brings along.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from doccls.system.temporary import temporary_folder

__all__ = ["Axes", "Figure", "MaxNLocator", "mpl"]


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


with (
    temporary_folder("doccls-matplotlib-") as _folder,
    _setting(MPLCONFIGDIR=str(_folder), MATPLOTLIBRC=os.devnull, MPL_IGNORE_SYSTEM_FONTS="1"),
):
    import matplotlib as mpl
    import matplotlib.style  # noqa: F401 (otherwise `rcdefaults` imports it, which searches the user's folder)
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

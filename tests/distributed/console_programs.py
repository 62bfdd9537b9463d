"""Programs whose console, named by DOCCLS_TEST_CONSOLE, takes no output, or not all of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from doccls import train as train_module
from doccls.reporting import console as console_module


def train(argv: list[str]) -> int:
    """Run `doccls.train`; none of its files may have the number of a standard stream."""
    _KINDS[os.environ["DOCCLS_TEST_CONSOLE"]]()
    code = train_module.main(argv)
    if sys.stdout is None:
        null = Path(os.devnull).stat().st_rdev
        assert [os.fstat(descriptor).st_rdev for descriptor in (0, 1, 2)] == [null] * 3
    return code


def launch(argv: list[str]) -> int:
    """Run a launcher, as `forked_launcher` does; the consoles of its ranks are not concerned."""
    from forked_launcher import main

    _KINDS[os.environ["DOCCLS_TEST_CONSOLE"]]()
    return main(argv)


def _close() -> None:
    """Leave the process as Python starts one without descriptors."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]


def _fill_disk() -> None:
    _connect(os.open("/dev/full", os.O_WRONLY))


def _break_pipe() -> None:
    """Write to a pipe whose reader leaves after the first line."""
    read_end, write_end = os.pipe()
    subprocess.Popen(["head", "-1"], stdin=read_end, stdout=subprocess.DEVNULL)
    os.close(read_end)
    _connect(write_end)


def _block_pipe() -> None:
    """Write to a pipe that nobody reads and that is nearly full."""
    console_module.PATIENCE_S = 0.1
    _, write_end = os.pipe()
    os.write(write_end, b"x" * 61440)
    _connect(write_end)


def _use_terminal() -> None:
    """Write to the terminal that DOCCLS_TEST_TERMINAL names; it does not become the controlling one."""
    _connect(os.open(os.environ["DOCCLS_TEST_TERMINAL"], os.O_WRONLY | os.O_NOCTTY))


def _use_ascii() -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, open(descriptor, "w", encoding="ascii", closefd=False))  # noqa: SIM115


def _connect(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


_KINDS: dict[str, Callable[[], None]] = {
    "closed": _close,
    "full disk": _fill_disk,
    "broken pipe": _break_pipe,
    "stuck pipe": _block_pipe,
    "ascii": _use_ascii,
    "terminal": _use_terminal,
}

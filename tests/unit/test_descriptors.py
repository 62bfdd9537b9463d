"""Standard descriptors: missing ones are opened, and no write blocks for longer than its limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from doccls.system import descriptors
from doccls.system.descriptors import discard_output, write_closing, write_within

LINE = b"x" * 99 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe; the test may close its read end."""
    read_end, write_end = os.pipe()
    yield read_end, write_end
    for descriptor in (read_end, write_end):
        try:
            os.close(descriptor)
        except OSError:
            assert descriptor == read_end


def fill(descriptor: int) -> int:
    """Write lines until nobody takes any more, and return how many fitted."""
    count = 0
    with pytest.raises(TimeoutError, match="nobody reads it"):
        while True:
            write_within(descriptor, LINE, 0.0)
            count += 1
    return count


def test_text_longer_than_a_pipe_is_written_in_full(pipe: tuple[int, int], tmp_path: Path) -> None:
    read_end, write_end = pipe
    text = LINE * 5000
    with (tmp_path / "copy").open("wb") as copy:
        reader = subprocess.Popen(["cat"], stdin=read_end, stdout=copy)
    waited_s = write_within(write_end, text, None)
    discard_output(write_end)
    discard_output(read_end)
    assert reader.wait(30) == 0 and (tmp_path / "copy").read_bytes() == text
    assert waited_s >= 0


@pytest.mark.parametrize("blocking", [True, False])
def test_full_pipe_does_not_block(pipe: tuple[int, int], blocking: bool) -> None:
    read_end, write_end = pipe
    os.set_blocking(write_end, blocking)
    assert fill(write_end) > 0
    write_closing(write_end, "last line\n")
    os.read(read_end, 65536)
    assert write_within(write_end, LINE, 0.0) == 0


def test_pipe_that_another_process_fills_before_the_write_does_not_block(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = pipe
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, LINE)
    os.set_blocking(write_end, True)
    monkeypatch.setattr(descriptors, "is_ready", lambda *_: True)  # as it was just before
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_within, write_end, LINE, 0.05)
        try:
            with pytest.raises(OSError, match="nobody reads it"):
                writing.result(30)
        finally:
            os.read(read_end, 65536)
    assert os.get_blocking(write_end), "shared with other processes"


def test_terminal_that_nobody_reads_does_not_block_and_one_that_hangs_up_fails() -> None:
    master, slave = os.openpty()
    try:
        assert fill(slave) > 0
        assert os.get_blocking(slave), "shared with the shell"
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.read(master, 65536)
        write_within(slave, LINE, 30.0)
    finally:
        os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        write_within(slave, LINE, 0.0)
    os.close(slave)


def test_pipe_without_a_reader_fails(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(BrokenPipeError):
        write_within(pipe[1], LINE, None)
    write_closing(pipe[1], "lost\n")
    discard_output(pipe[1])
    assert os.get_inheritable(pipe[1])
    write_within(pipe[1], LINE, None)


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_missing_descriptors_are_opened_and_inherited(tmp_path: Path, closed: str) -> None:
    """Afterwards no file gets one of their numbers, and a child process has all three."""
    result = tmp_path / "result"
    code = (
        "import os, subprocess, sys; from doccls.system.descriptors import open_missing_descriptors;"
        "open_missing_descriptors(); file = open(sys.argv[1], 'w'); number = file.fileno();"
        "child = subprocess.run([sys.executable, '-c', 'import os; [os.fstat(n) for n in (0, 1, 2)]']);"
        "print(number > 2, child.returncode, file=file)"
    )
    command = ["bash", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, code, str(result)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert result.read_text() == "True 0\n"

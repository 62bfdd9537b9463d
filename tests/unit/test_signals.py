"""Signals are recorded, never raised by a handler: only code that checks for a stop raises, and writes complete."""

from __future__ import annotations

import faulthandler
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from doccls.reporting.console import exit_code
from doccls.system import atomic_files
from doccls.system.atomic_files import replacing, write_array, write_bytes, write_text
from doccls.system.signals import (
    STOP_SIGNALS,
    Interrupted,
    attributing_errors_to_stop,
    check_stop,
    handling_signals,
    ignore_signals,
    stop_on_sigusr2,
    stop_requested,
    stopping_gracefully,
)

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_signal_is_recorded_and_raised_by_check_stop(number: signal.Signals) -> None:
    with handling_signals(), stopping_gracefully():
        check_stop()
        signal.raise_signal(number)
        assert stop_requested() == number
        with pytest.raises(Interrupted) as caught:
            check_stop()
    assert exit_code(caught.value) == 128 + number
    assert str(caught.value) == f"{number.name} received"


def test_first_of_several_signals_counts() -> None:
    with handling_signals(), stopping_gracefully():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # from a terminal and a launcher at once
            signal.raise_signal(number)
        assert stop_requested() == signal.SIGTERM


def test_sigusr2_dumps_stacks_or_requests_stop(capfd: pytest.CaptureFixture[str]) -> None:
    with handling_signals(), stopping_gracefully():
        signal.raise_signal(signal.SIGUSR2)
        assert stop_requested() is None
        assert "test_sigusr2_dumps_stacks_or_requests_stop" in capfd.readouterr().err
        stop_on_sigusr2()
        signal.raise_signal(signal.SIGUSR2)
        assert stop_requested() == signal.SIGUSR2
        assert "most recent call first" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with handling_signals():  # it dumps stacks as before
        signal.raise_signal(signal.SIGUSR2)
        assert "most recent call first" in capfd.readouterr().err
        ignore_signals()
        signal.raise_signal(signal.SIGUSR2)  # shows where a process hangs while it exits
        assert "most recent call first" in capfd.readouterr().err
    faulthandler.unregister(signal.SIGUSR2)


def test_sigusr2_dumps_stacks_in_second_command_of_a_process() -> None:
    """The first command leaves it registered; in a process of its own, since a default handler would end this one."""
    program = """
import signal
from doccls.system.signals import handling_signals, ignore_signals
with handling_signals():
    ignore_signals()
signal.signal(signal.SIGUSR2, signal.SIG_DFL)
with handling_signals():
    signal.raise_signal(signal.SIGUSR2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "most recent call first" in done.stderr


def test_handlers_and_recorded_signal_are_reset() -> None:
    before = [signal.getsignal(number) for number in BOTH], threading.active_count()
    with handling_signals(), stopping_gracefully():
        signal.raise_signal(signal.SIGTERM)
    assert ([signal.getsignal(number) for number in BOTH], threading.active_count()) == before
    with handling_signals():
        assert stop_requested() is None


def test_hangup_requests_stop_unless_ignored() -> None:
    with handling_signals(), stopping_gracefully():
        signal.raise_signal(signal.SIGHUP)
        assert stop_requested() == signal.SIGHUP
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handling_signals(), stopping_gracefully():
            signal.raise_signal(signal.SIGHUP)
            assert stop_requested() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_further_signal_does_not_interrupt_exit() -> None:
    with handling_signals():
        ignore_signals()
        for number in BOTH:
            signal.raise_signal(number)
    for number in BOTH:
        signal.raise_signal(number)


def test_error_after_stop_request_becomes_interrupted() -> None:
    with handling_signals(), stopping_gracefully():
        with pytest.raises(ZeroDivisionError), attributing_errors_to_stop():
            _ = 1 // 0
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted) as caught, attributing_errors_to_stop():
            _ = 1 // 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and caught.value.exit_code == 130


def test_interrupted_is_not_an_exception_that_handlers_catch() -> None:
    assert not issubclass(Interrupted, Exception)


# --- writes ----------------------------------------------------------------------------------------------------------

ARRAY = np.arange(6, dtype=np.float32)


def write_torch(path: Path) -> None:
    with atomic_files.replacing(path) as file:
        torch.save({"weight": torch.from_numpy(ARRAY), "bias": torch.ones(3)}, file)


WRITES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "torch": (write_torch, lambda path: torch.load(path, weights_only=True)["weight"].tolist()),
    "npy": (lambda path: write_array(path, ARRAY), lambda path: np.load(path).tolist()),
    "safetensors": (lambda path: write_bytes(path, save({"a": ARRAY})), lambda path: load_file(path)["a"].tolist()),
    "json": (lambda path: write_text(path, json.dumps(ARRAY.tolist())), lambda path: json.loads(path.read_text())),
}


class Disturbed:
    """A file that calls `disturb` before its n-th write."""

    def __init__(self, file: BinaryIO, number: int, disturb: Callable[[], None]) -> None:
        self._file, self._left, self._disturb = file, number, disturb

    def write(self, data: Any) -> int:
        if self._left == 0:
            self._disturb()
        self._left -= 1
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def disturb_write(monkeypatch: pytest.MonkeyPatch, number: int, disturb: Callable[[], None]) -> None:
    @contextmanager
    def disturbed(*arguments: Any, **options: Any) -> Iterator[Any]:
        with replacing(*arguments, **options) as file:
            yield Disturbed(file, number, disturb)

    monkeypatch.setattr(atomic_files, "replacing", disturbed)


def count_writes(kind: str, path: Path) -> int:
    """Return the number of write calls for one kind of file."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        while True:
            disturbed: list[int] = []
            disturb_write(patch, len(calls), lambda disturbed=disturbed: disturbed.append(1))  # type: ignore[misc]
            WRITES[kind][0](path)
            if not disturbed:
                return len(calls)
            calls += disturbed


@pytest.mark.parametrize("kind", WRITES)
def test_signal_at_any_write_call_leaves_complete_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = WRITES[kind]
    path = tmp_path / "file"
    calls = count_writes(kind, path)
    assert calls >= (2 if kind in ("torch", "npy") else 1)
    for call in range(calls):
        path.write_bytes(b"old")
        disturb_write(monkeypatch, call, lambda: signal.raise_signal(signal.SIGTERM))
        with handling_signals(), stopping_gracefully():
            write(path)
            assert stop_requested() == signal.SIGTERM
        assert read(path) == ARRAY.tolist()
        assert list(tmp_path.iterdir()) == [path]


def test_exception_in_write_call_becomes_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason why handlers do not raise: C++ turns it into a RuntimeError, with exit code 1."""

    def interrupt() -> None:
        raise Interrupted(signal.SIGTERM)

    disturb_write(monkeypatch, 1, interrupt)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_torch(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_in_another_thread_signals_stay_with_the_caller(capfd: pytest.CaptureFixture[str]) -> None:
    """As where a notebook or a service trains in a thread: Python sets handlers only in the main thread."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    during = list[Any]()

    def train() -> None:
        with handling_signals(), stopping_gracefully():
            stop_on_sigusr2()
            during.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            ignore_signals()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert before == during == [signal.getsignal(number) for number in STOP_SIGNALS]
    assert capfd.readouterr().err.count("[WARNING] not called from the main thread: signals stay with the caller") == 1

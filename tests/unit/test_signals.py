"""A signal is a note: nothing raises by itself, whatever is being written, and the code that asks leaves."""

from __future__ import annotations

import faulthandler
import json
import signal
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
from doccls.system import atomic_files as artifacts
from doccls.system.atomic_files import replacing, write_array, write_bytes, write_text
from doccls.system.signals import (
    Interrupted,
    check_stop,
    handling_signals,
    ignore_signals,
    naming_one_cause,
    stop_on_sigusr2,
    stop_requested,
    stopping_gracefully,
)

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_raised_where_the_code_asks(number: signal.Signals) -> None:
    with handling_signals(), stopping_gracefully():
        check_stop()
        signal.raise_signal(number)
        assert stop_requested() == number
        with pytest.raises(Interrupted) as caught:
            check_stop()
    assert exit_code(caught.value) == 128 + number
    assert str(caught.value) == f"{number.name} received"


def test_the_first_of_several_names_the_cause() -> None:
    with handling_signals(), stopping_gracefully():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # a terminal's and a launcher's, at once
            signal.raise_signal(number)
        assert stop_requested() == signal.SIGTERM


def test_sigusr2_writes_stacks_or_asks_for_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with handling_signals(), stopping_gracefully():
        signal.raise_signal(signal.SIGUSR2)
        assert stop_requested() is None
        assert "test_sigusr2_writes_stacks_or_asks_for_the_end" in capfd.readouterr().err
        stop_on_sigusr2()
        signal.raise_signal(signal.SIGUSR2)
        assert stop_requested() == signal.SIGUSR2
        assert "most recent call first" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with handling_signals():  # as at first
        signal.raise_signal(signal.SIGUSR2)
        assert "most recent call first" in capfd.readouterr().err
        ignore_signals()
        signal.raise_signal(signal.SIGUSR2)  # a process that hangs at its end says where
        assert "most recent call first" in capfd.readouterr().err
    faulthandler.unregister(signal.SIGUSR2)


def test_nothing_is_left_of_the_handlers_and_the_note() -> None:
    before = [signal.getsignal(number) for number in BOTH], threading.active_count()
    with handling_signals(), stopping_gracefully():
        signal.raise_signal(signal.SIGTERM)
    assert ([signal.getsignal(number) for number in BOTH], threading.active_count()) == before
    with handling_signals():
        assert stop_requested() is None


def test_a_hangup_asks_for_the_end_unless_it_is_ignored() -> None:
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


def test_the_end_is_not_torn_by_a_further_signal() -> None:
    with handling_signals():
        ignore_signals()
        for number in BOTH:
            signal.raise_signal(number)
    for number in BOTH:
        signal.raise_signal(number)


def test_what_breaks_after_a_stop_was_asked_for_is_that_stop() -> None:
    with handling_signals(), stopping_gracefully():
        with pytest.raises(ZeroDivisionError), naming_one_cause():
            _ = 1 // 0
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted) as caught, naming_one_cause():
            _ = 1 // 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and caught.value.exit_code == 130


def test_interrupted_is_no_exception_that_code_on_the_way_would_handle() -> None:
    assert not issubclass(Interrupted, Exception)


# --- writes ----------------------------------------------------------------------------------------------------------

ARRAY = np.arange(6, dtype=np.float32)


def write_torch(path: Path) -> None:
    with artifacts.replacing(path) as file:
        torch.save({"weight": torch.from_numpy(ARRAY), "bias": torch.ones(3)}, file)


WRITES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "torch": (write_torch, lambda path: torch.load(path, weights_only=True)["weight"].tolist()),
    "npy": (lambda path: write_array(path, ARRAY), lambda path: np.load(path).tolist()),
    "safetensors": (lambda path: write_bytes(path, save({"a": ARRAY})), lambda path: load_file(path)["a"].tolist()),
    "json": (lambda path: write_text(path, json.dumps(ARRAY.tolist())), lambda path: json.loads(path.read_text())),
}


class Disturbed:
    """A file that does something before its n-th write."""

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
    def disturbed(path: Path, **words: Any) -> Iterator[Any]:
        with replacing(path, **words) as file:
            yield Disturbed(file, number, disturb)

    monkeypatch.setattr(artifacts, "replacing", disturbed)


def count_writes(kind: str, path: Path) -> int:
    """Write calls of one kind of file."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        while True:
            struck: list[int] = []
            disturb_write(patch, len(calls), lambda struck=struck: struck.append(1))  # type: ignore[misc]
            WRITES[kind][0](path)
            if not struck:
                return len(calls)
            calls += struck


@pytest.mark.parametrize("kind", WRITES)
def test_a_signal_at_any_write_call_leaves_the_new_file_whole(
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


def test_an_exception_in_a_write_call_would_become_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why signals do not raise: C++ makes a RuntimeError of it, and exit code 1."""

    def kill() -> None:
        raise Interrupted(signal.SIGTERM)

    disturb_write(monkeypatch, 1, kill)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_torch(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []

"""W&B in its process: which mode it starts in, what it is given, and what is said of its failures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb

from doccls.reporting import wandb_process
from doccls.reporting.wandb_process import WandbRun, track

RUN = WandbRun("pages", "team", "v1-abc", "v1-abc-fold2", {"fold": 2}, "folder")
NUMBERS: list[dict[str, Any]] = [{"values": {"train/loss": 0.5}, "step": 7}, {"exit_code": 0}]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished: list[int | None] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Arguments of each wandb.init; its run is under `run`."""
    made: list[dict[str, Any]] = []

    def start(**options: Any) -> FakeRun:
        run = FakeRun()
        made.append(options | {"run": run})
        return run

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=wandb.Settings()))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(wandb_process, "_answers", lambda url: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return made


def give_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


def test_without_a_key_it_logs_offline(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_with_a_key_it_logs_online(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_key(monkeypatch)
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["online"]


def test_offline_by_environment_wins_over_a_key(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_wandb_disabled_by_environment_stays_disabled(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["disabled"]


def test_a_key_in_netrc_counts_and_one_for_another_host_does_not(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for host in (urlsplit(wandb.Settings().base_url).hostname, "example.org"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
        track(RUN, NUMBERS, print)
    (tmp_path / "netrc").write_text("this is no netrc")
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["online", "offline", "offline"]


def test_a_server_that_does_not_answer_is_not_waited_for(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=wandb.Settings(base_url="http://own.host:81")))
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or FakeRun())
    monkeypatch.setattr(wandb_process, "getproxies", dict)

    def refuse(address: tuple[str, int], timeout: float) -> None:
        assert timeout <= 5 and address == ("own.host", 81)
        raise TimeoutError

    monkeypatch.setattr(wandb_process.socket, "create_connection", refuse)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    give_key(monkeypatch)
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_it_is_told_what_the_training_says(calls: list[dict[str, Any]]) -> None:
    track(RUN, [*NUMBERS[:1], {"exit_code": 3}, {"exit_code": 1}], print)
    (call,) = calls
    told = {name: call[name] for name in ("project", "entity", "group", "name", "config", "dir")}
    assert told == {
        "project": "pages", "entity": "team", "group": "v1-abc", "name": "v1-abc-fold2", "config": {"fold": 2},
        "dir": "folder",
    }  # fmt: skip
    assert call["run"].logged == [({"train/loss": 0.5}, 7)] and call["run"].finished == [3]


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.CommError("no network"),
        wandb.errors.UsageError("bad key"),
        OSError("disk"),
        TimeoutError(),
        RuntimeError("wandb-core died"),
        ValueError("bad project"),
    ],
)
def test_a_wandb_that_does_not_start_is_told_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    calls: list[dict[str, Any]],
) -> None:
    give_key(monkeypatch)

    def fail(**options: Any) -> None:
        calls.append(options)
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    said: list[str] = []
    track(RUN, NUMBERS, said.append)
    assert [line.partition(" (")[0] for line in said] == ["W&B online did not start", "W&B offline did not start"]
    assert [call["mode"] for call in calls] == ["online", "offline"]


def test_an_unreachable_server_falls_back_to_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    give_key(monkeypatch)
    start = wandb.init

    def fail_online(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return start(**options)

    monkeypatch.setattr(wandb, "init", fail_online)
    track(RUN, NUMBERS, print)
    assert [call["mode"] for call in calls] == ["offline"]
    assert calls[0]["run"].logged


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_wandb_that_fails_later_does_not_stop_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, calls: list[dict[str, Any]]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("gone")

    monkeypatch.setattr(FakeRun, where, fail)
    said: list[str] = []
    track(RUN, NUMBERS, said.append)
    assert said[1:] == ["W&B failed (CommError: gone); training goes on without it"]

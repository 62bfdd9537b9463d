"""The W&B process: how it selects the mode, what it passes to W&B, and how it reports errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb

from doccls.reporting import wandb_process
from doccls.reporting.wandb_process import WandbRun, track

RUN = WandbRun("0123456789abcdef", "pages", "team", "v1-abc", "v1-abc-fold2", {"fold": 2}, "folder")
MESSAGES: list[dict[str, Any]] = [{"values": {"train/loss": 0.5}, "step": 7}, {"exit_code": 0}]


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
    """Arguments of each wandb.init call, with its run under `run`."""
    started: list[dict[str, Any]] = []

    def start(**options: Any) -> FakeRun:
        run = FakeRun()
        started.append(options | {"run": run})
        return run

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=wandb.Settings()))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(wandb_process, "_is_reachable", lambda url: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return started


def set_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


def test_mode_is_offline_without_key(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_mode_is_online_with_key(calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_key(monkeypatch)
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["online"]


def test_offline_from_environment_overrides_key(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_disabled_from_environment_stays_disabled(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["disabled"]


def test_netrc_key_counts_only_for_the_host(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for host in (urlsplit(wandb.Settings().base_url).hostname, "example.org"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
        track(RUN, MESSAGES, print)
    (tmp_path / "netrc").write_text("not a netrc file")
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["online", "offline", "offline"]


def test_unreachable_server_selects_offline_without_waiting(
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
    set_key(monkeypatch)
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["offline"]


def test_messages_are_passed_to_wandb(calls: list[dict[str, Any]]) -> None:
    track(RUN, [*MESSAGES[:1], {"exit_code": 3}, {"exit_code": 1}], print)
    (call,) = calls
    arguments = {name: call[name] for name in ("id", "project", "entity", "group", "name", "config", "dir")}
    assert arguments == {
        "id": "0123456789abcdef",
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
def test_failed_start_is_reported_and_training_continues(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    calls: list[dict[str, Any]],
) -> None:
    set_key(monkeypatch)

    def fail(**options: Any) -> None:
        calls.append(options)
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    messages: list[str] = []
    track(RUN, MESSAGES, messages.append)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    assert messages == [f"W&B {mode} did not start ({reason}); training continues" for mode in ("online", "offline")]
    assert [call["mode"] for call in calls] == ["online", "offline"]


def test_failed_online_start_falls_back_to_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    set_key(monkeypatch)
    start = wandb.init

    def fail_online(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return start(**options)

    monkeypatch.setattr(wandb, "init", fail_online)
    track(RUN, MESSAGES, print)
    assert [call["mode"] for call in calls] == ["offline"]
    assert calls[0]["run"].logged


@pytest.mark.parametrize("where", ["log", "finish"])
def test_later_wandb_error_does_not_stop_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, calls: list[dict[str, Any]]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("gone")

    monkeypatch.setattr(FakeRun, where, fail)
    messages: list[str] = []
    track(RUN, MESSAGES, messages.append)
    assert messages[1:] == ["W&B failed (CommError: gone); training continues without it"]


def test_only_an_online_run_is_resumed(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    track(RUN, MESSAGES, print)
    set_key(monkeypatch)
    track(RUN, MESSAGES, print)
    assert [(call["mode"], call["resume"]) for call in calls] == [("offline", None), ("online", "allow")]


@pytest.mark.parametrize("project", ["team/pages", "p" * 129])
def test_refused_project_is_reported_in_wandbs_words(
    project: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    messages: list[str] = []
    track(replace(RUN, project=project, folder=str(tmp_path)), MESSAGES, messages.append)
    (message,) = messages
    assert message.startswith("W&B offline did not start (UsageError: Invalid project name ")
    assert "exceeded 128 characters" in message or "cannot contain characters" in message


def test_reason_is_one_line_without_the_key(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise ValueError(f"bad\n  key {'x' * 40}: \x1b[2J" + "y" * 500)

    set_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", fail)
    messages: list[str] = []
    track(RUN, MESSAGES, messages.append)
    assert messages[0].startswith("W&B offline did not start (ValueError: bad key ***: \ufffd[2Jyyy")
    assert len(messages[0]) < 400

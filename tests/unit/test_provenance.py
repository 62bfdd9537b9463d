"""Provenance: versions, commit and command, without secrets."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from doccls.run import provenance
from doccls.run.provenance import describe_software, read_git_commit, render_command


def test_versions_that_affect_results_are_recorded() -> None:
    software = describe_software()
    assert software["packages"]["torch"] == metadata.version("torch")
    assert software["packages"]["timm"] == metadata.version("timm")
    assert {"python", "platform", "packages", "git_commit"} <= set(software)


def test_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("no-such-package-4711",))
    assert describe_software()["packages"]["no-such-package-4711"] is None


def test_rendered_command_splits_into_the_same_arguments() -> None:
    arguments = ["-m", "doccls.train", "--config", "my file.yaml", "--set", "data.id_col=a b"]
    assert shlex.split(render_command(arguments)) == [sys.executable, *arguments]


def test_secrets_in_command_are_redacted() -> None:
    command = render_command(["train", "--set", "tracking.api_key=SEKRIT", "--set=wandb_token=SEKRIT"])
    assert "SEKRIT" not in command and "tracking.api_key=" in command


def test_no_commit_outside_git(tmp_path: Path) -> None:
    assert read_git_commit(tmp_path) is None


def fake_git(monkeypatch: pytest.MonkeyPatch, status: str | Exception) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if isinstance(status, Exception):
            raise status
        return subprocess.CompletedProcess(command, 0, "abc123\n" if "rev-parse" in command else status)

    monkeypatch.setattr(provenance.subprocess, "run", run)


@pytest.mark.parametrize(
    ("status", "commit"),
    [
        ("", "abc123"),
        (" M a.py\n", "abc123-dirty"),
        (FileNotFoundError("git"), None),
        (subprocess.CalledProcessError(128, "git"), None),
        (subprocess.TimeoutExpired("git", 10), None),
    ],
)
def test_commit_is_marked_dirty_and_missing_git_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | Exception, commit: str | None
) -> None:
    (tmp_path / ".git").mkdir()
    fake_git(monkeypatch, status)
    assert read_git_commit(tmp_path) == commit

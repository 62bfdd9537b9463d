"""Downloads: retried on network failures, rejected with a hint if retries cannot help. The hub is a stand-in."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import httpx2
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from doccls.config.schema import ModelConfig
from doccls.errors import DownloadError, UserError
from doccls.model import download as download_module
from doccls.model.build import build_model, fetch_pretrained
from doccls.model.download import download, locate_source
from doccls.system import signals
from doccls.system.signals import Interrupted

NAME = "test_resnet"
SIZE = 64
ADDRESS = "https://huggingface.co/timm/test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of a hub that this process may not contact."""
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that collects the waits, in seconds, instead of sleeping."""
    waits_s: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", waits_s.append)
    return waits_s


class Hub:
    """A hub that raises one error after the other and then returns the model."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = iter(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        for error in self.errors:
            raise error
        return "model"


def http_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind("no", response=httpx2.Response(status, request=httpx2.Request("HEAD", ADDRESS)))


def wrap(cause: Exception) -> LocalEntryNotFoundError:
    """Wrap a cause as the hub's client does."""
    error = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = cause
    return error


NETWORK_FAILURES = [
    wrap(httpx2.ConnectError("[Errno 111] Connection refused")),
    wrap(httpx2.ConnectError("[Errno -2] Name or service not known")),
    wrap(httpx2.ConnectTimeout("timed out")),
    wrap(http_error(500)),
    wrap(http_error(503)),
    wrap(http_error(429)),
    wrap(FileMetadataError("HF_ENDPOINT is no hub")),
    http_error(502),
    httpx2.ReadTimeout("timed out"),
    httpx2.ProxyError("proxy is down"),
    ConnectionError("refused"),
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    TimeoutError(),
    URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
    HTTPError(ADDRESS, 503, "Service Unavailable", None, None),  # type: ignore[arg-type]
    OSError("no route to host\nlong story"),
]


@pytest.mark.parametrize("error", NETWORK_FAILURES, ids=repr)
def test_failing_network_is_tried_three_times(
    error: Exception, waits_s: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(error, error, error, error)
    with pytest.raises(DownloadError) as caught:
        download(NAME, hub)
    assert hub.calls == 3 and waits_s == [2.0, 8.0]
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["next attempt in 2 s", "next attempt in 8 s"]
    assert all(line.startswith(f"[WARNING] a download for {NAME!r} failed (") for line in lines)
    message = str(caught.value)
    for text in (f"{NAME!r}", ADDRESS, socket.gethostname(), "model.weights", constants.HF_HOME, "HF_HUB_OFFLINE=1"):
        assert text in message
    assert "long story" not in message and "\n" not in message and caught.value.__cause__ is error
    assert not isinstance(caught.value, UserError)


def test_reported_reason_is_root_cause(waits_s: list[float]) -> None:
    with pytest.raises(DownloadError, match=r"\(\[Errno 111\] Connection refused\)\. Without"):
        download(NAME, Hub(*3 * [wrap(httpx2.ConnectError("[Errno 111] Connection refused"))]))
    with pytest.raises(DownloadError, match=r"\(TimeoutError\)"):
        download(NAME, Hub(*3 * [TimeoutError()]))


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_download_succeeds_once_network_is_back(failures: int, waits_s: list[float]) -> None:
    assert download(NAME, Hub(*NETWORK_FAILURES[:failures])) == "model"
    assert waits_s == [2.0, 8.0][:failures]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (http_error(404, RemoteEntryNotFoundError), 404),
        (http_error(401, RepositoryNotFoundError), 401),
        (http_error(403, GatedRepoError), 403),
        (wrap(http_error(403)), 403),
        (HTTPError(ADDRESS, 404, "Not Found", None, None), 404),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_refusal_of_hub_is_not_retried(error: Exception, status: int, waits_s: list[float]) -> None:
    hub = Hub(error)
    with pytest.raises(UserError, match=rf"'{NAME}'.*{ADDRESS} answers with HTTP status {status}.*HF_TOKEN"):
        download(NAME, hub)
    assert hub.calls == 1 and waits_s == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/cache"), OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError("Config file not found: /x/config.json"), ValueError("x"), RuntimeError("x"), KeyError("x"),
    ],
)  # fmt: skip
def test_other_errors_are_raised_unchanged(error: Exception, waits_s: list[float]) -> None:
    with pytest.raises(type(error)) as caught:
        download(NAME, Hub(error))
    assert caught.value is error and waits_s == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_cache_without_file_locks_is_reported_and_not_retried(hub: Path, waits_s: list[float], number: int) -> None:
    client = Hub(OSError(number, "No locks available"))  # of fcntl.flock, which names no file
    with pytest.raises(UserError, match=rf"'{NAME}'.*{hub} has no file locks \(No locks available\): set HF_HOME to"):
        download(NAME, client)
    assert client.calls == 1 and waits_s == []


def test_cache_whose_files_cannot_be_mapped_is_reported_and_not_retried(hub: Path, waits_s: list[float]) -> None:
    client = Hub(OSError("No such device (os error 19)"))
    with pytest.raises(UserError, match=rf"'{NAME}'.*{hub} can't be mapped .*No such device.*: set HF_HOME to"):
        download(NAME, client)
    assert client.calls == 1 and waits_s == []


def test_stop_request_ends_retries(monkeypatch: pytest.MonkeyPatch, waits_s: list[float]) -> None:
    monkeypatch.setattr(signals, "_requested", 15)
    with pytest.raises(Interrupted):
        download(NAME, Hub(ConnectionError("refused")))
    assert waits_s == []


def test_signal_ends_process_during_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    graceful: list[bool] = []
    monkeypatch.setattr(download_module.time, "sleep", lambda wait_s: graceful.append(signals._graceful))
    with signals.stopping_gracefully():
        download(NAME, Hub(ConnectionError("refused")))
        assert graceful == [False] and signals._graceful


@pytest.mark.parametrize(
    ("name", "source", "cache"),
    [
        (NAME, ADDRESS, "hub"),
        ("hf-hub:me/mine", "https://huggingface.co/me/mine", "hub"),
        ("eva_large_patch14_336.in22k_ft_in1k", "https://huggingface.co/timm/", "hub"),
    ],
)
def test_source_and_cache_of_weights(name: str, source: str, cache: str, tmp_path: Path) -> None:
    address, folder = locate_source(name)
    assert address.startswith(source) and folder == tmp_path / cache


def test_weights_outside_hub_are_cached_by_torch() -> None:
    name = next(
        name for name in timm.list_pretrained()
        if (weights := timm.get_pretrained_cfg(name)) and weights.url and not weights.hf_hub_id
    )  # fmt: skip
    address, folder = locate_source(name)
    assert address.startswith("http") and folder == Path(torch.hub.get_dir()) / "checkpoints"


# --- downloads while a model is built --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "hf-hub:timm/test_resnet.r160_in1k"])
@pytest.mark.parametrize("build", [lambda config: build_model(config, 3, SIZE), lambda c: fetch_pretrained(c, SIZE)])
def test_offline_process_with_empty_cache_fails_immediately(
    name: str, build: Any, hub: Path, waits_s: list[float]
) -> None:
    """This uses the real client, offline as in jobs of doccls-launch."""
    with pytest.raises(UserError) as caught:
        build(ModelConfig(name=name))
    message = str(caught.value)
    for text in (name, str(hub), socket.gethostname(), "HF_HUB_OFFLINE is set", "doccls-launch", "HF_HOME"):
        assert text in message
    assert "can't be built" not in message and waits_s == []


@pytest.fixture
def timm_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for `timm.create_model(..., pretrained=True)`."""
    hub, real = Hub(), timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            hub()
        model: torch.nn.Module = real(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    yield hub


def test_model_is_built_once_network_is_back(timm_hub: Hub, waits_s: list[float]) -> None:
    timm_hub.errors = iter([ConnectionError("refused"), ConnectionError("refused")])
    build_model(ModelConfig(name=NAME), 3, SIZE)
    assert timm_hub.calls == 3


def test_persistent_network_failure_is_not_user_error_in_job(timm_hub: Hub, waits_s: list[float]) -> None:
    timm_hub.errors = iter(3 * [ConnectionError("refused")])
    with pytest.raises(DownloadError, match="could not be fetched from"):
        build_model(ModelConfig(name=NAME), 3, SIZE)


def test_persistent_network_failure_is_user_error_at_submission(timm_hub: Hub, waits_s: list[float]) -> None:
    timm_hub.errors = iter(3 * [ConnectionError("refused")])
    with pytest.raises(UserError, match="could not be fetched from"):
        fetch_pretrained(ModelConfig(name=NAME), SIZE)
    assert waits_s == [2.0, 8.0]


def test_fetch_pretrained_fills_cache(timm_hub: Hub, hub: Path) -> None:
    assert fetch_pretrained(ModelConfig(name=NAME), SIZE) == hub
    assert timm_hub.calls == 1


@pytest.mark.parametrize(
    "keys", [{"pretrained": False}, {"weights": Path("w.pth")}, {"name": "local-dir:/models/mine"}], ids=str
)
def test_config_without_hub_weights_does_not_contact_hub(timm_hub: Hub, keys: dict[str, Any]) -> None:
    assert fetch_pretrained(ModelConfig(**{"name": NAME, **keys}), SIZE) is None
    assert timm_hub.calls == 0


def test_unknown_name_is_rejected_before_hub_is_contacted(timm_hub: Hub) -> None:
    with pytest.raises(UserError, match="timm has no such model"):
        fetch_pretrained(ModelConfig(name="resnt50"), SIZE)
    assert timm_hub.calls == 0

"""Downloads of pretrained weights, with retries on network failures and errors that suggest a fix."""

import errno
import socket
import sys
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import timm
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from doccls.errors import DownloadError, UserError
from doccls.system.signals import check_stop, stopping_immediately

_T = TypeVar("_T")
# The HTTP library below the hub's client is requests, httpx or httpx2, depending on its version.
_HTTP_ERROR: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
_WAITS_S = (2.0, 8.0)  # between attempts; the hub's client retries within each for about 20 s
_TRANSIENT_STATUSES = (408, 425, 429)  # below 500: timeout, too early, too many requests
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Of mmap(2), on some FUSE file systems, in messages of safetensors, which is written in Rust.
_NO_MAPPING = (errno.ENODEV, errno.EINVAL)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of flock(2), on NFS without a lock daemon and some FUSE


def download(name: str, fetch: Callable[[], _T]) -> _T:
    """Return the result of `fetch`, in which timm may download files for the model called `name`.

    Network failures are retried, with a line on stderr each time; a signal ends the process immediately.

    Raises:
        UserError: the hub refuses, or the hub's client is offline and its cache lacks the files.
        DownloadError: the network failed at every attempt.
        Exception: any other exception of `fetch`.
    """
    waits_s = iter(_WAITS_S)
    with stopping_immediately():
        while True:
            try:
                return fetch()
            except (OSError, _HTTP_ERROR) as error:
                failure = _translate_error(name, error)
                if failure is None:
                    raise
                wait_s = next(waits_s, None)
                if wait_s is None or isinstance(failure, UserError):
                    raise failure from error
                print(
                    f"[WARNING] a download for {name!r} failed ({_find_reason(error)}): next attempt in {wait_s:g} s",
                    file=sys.stderr,
                    flush=True,
                )
            check_stop()
            time.sleep(wait_s)


def locate_source(name: str) -> tuple[str, Path]:
    """Return the URL of a model's pretrained weights and the folder of the cache that holds them."""
    if name.startswith("hf-hub:"):
        return f"{constants.ENDPOINT}/{name.removeprefix('hf-hub:')}", Path(constants.HF_HUB_CACHE)
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained and pretrained.url and not pretrained.hf_hub_id:
        return pretrained.url, Path(torch.hub.get_dir()) / "checkpoints"
    return f"{constants.ENDPOINT}/{pretrained.hf_hub_id if pretrained else name}", Path(constants.HF_HUB_CACHE)


def _translate_error(name: str, error: Exception) -> UserError | DownloadError | None:
    """Return an error that suggests a fix, or None if neither the hub nor the network has failed."""
    chain = _list_causes(error)
    source, cache = locate_source(name)
    host = socket.gethostname()
    local_source = "model.name: local-dir:FOLDER" if ":" in name else "model.weights: FILE.safetensors"
    if any(isinstance(cause, hub_errors.OfflineModeIsEnabled) for cause in chain):
        return UserError(
            f"model.name = {name!r}: its files are not in the cache {cache} on {host}, and HF_HUB_OFFLINE is set, as "
            "in all jobs that doccls-launch submits. Set HF_HOME to a folder shared with the machine that downloads, "
            f"or set {local_source}"
        )
    if isinstance(error, OSError) and error.errno in _NO_LOCKS:
        return UserError(
            f"model.name = {name!r}: the file system of the cache {cache} has no file locks ({error.strerror}): set "
            f"HF_HOME to a folder on another one, or set {local_source}"
        )
    if any(f"(os error {number})" in str(error) for number in _NO_MAPPING):
        return UserError(
            f"model.name = {name!r}: its files in the cache {cache} can't be mapped into memory ({error}): set "
            f"HF_HOME to a folder on another file system, or set {local_source}"
        )
    status = next((status for cause in chain if (status := _find_status(cause))), None)
    if status is not None and status < 500 and status not in _TRANSIENT_STATUSES:
        return UserError(
            f"model.name = {name!r}: {source} answers with HTTP status {status}: the files do not exist, or "
            f"access needs a token (HF_TOKEN). Choose another model.name, or set {local_source}"
        )
    if status is None and _is_local(error):
        return None
    return DownloadError(
        f"the files of {name!r} could not be fetched from {source} by {host} ({_find_reason(error)}). Without network "
        f"access, set HF_HUB_OFFLINE=1 and fill the cache (HF_HOME, now {constants.HF_HOME}), or set {local_source}"
    )


def _is_local(error: Exception) -> bool:
    """Return whether the error concerns a file on this machine."""
    if not isinstance(error, OSError) or isinstance(error, hub_errors.LocalEntryNotFoundError):
        return False
    return isinstance(error, FileNotFoundError) or error.filename is not None or error.errno in _FULL_DISK


def _find_reason(error: Exception) -> str:
    """Return the first line of the root cause, since the outer errors of the hub's client say little."""
    root = _list_causes(error)[-1]
    return str(root).strip().partition("\n")[0] or type(root).__name__


def _list_causes(error: BaseException) -> list[BaseException]:
    """List the error and its chain of causes, outermost first."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def _find_status(error: BaseException) -> int | None:
    """Return the HTTP status of the server's answer, if there was one."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status

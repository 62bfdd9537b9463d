"""Downloads of pretrained weights: tried again while the network fails, and in words when they can't be had."""

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
_HTTP_ERROR: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
"""Of the HTTP library below the hub's client: requests, httpx or httpx2, as its version is."""
_WAITS_S = (2.0, 8.0)
"""Between tries; the hub's own client retries each for about 20 s."""
_TRANSIENT_STATUSES = (408, 425, 429)
"""Of those below 500: timeout, too early, too many requests."""
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def download(name: str, fetch: Callable[[], _T]) -> _T:
    """What `fetch` returns, which lets timm download what it needs for the model of that name.

    A network that fails is tried again, with a line to stderr each time; a signal ends the process at once.

    Raises:
        UserError: the hub refuses, or the hub's client is offline and its cache lacks the files.
        DownloadError: the network failed each time.
        Exception: whatever else `fetch` raises.
    """
    waits_s = iter(_WAITS_S)
    with stopping_immediately():
        while True:
            try:
                return fetch()
            except (OSError, _HTTP_ERROR) as error:
                failure = _explain(name, error)
                if failure is None:
                    raise
                wait_s = next(waits_s, None)
                if wait_s is None or isinstance(failure, UserError):
                    raise failure from error
                print(
                    f"[WARNING] a download for {name!r} failed ({_find_reason(error)}): next try in {wait_s:g} s",
                    file=sys.stderr,
                    flush=True,
                )
            check_stop()
            time.sleep(wait_s)


def locate_source(name: str) -> tuple[str, Path]:
    """The address of a model's pretrained weights, and the folder of the cache that keeps them."""
    if name.startswith("hf-hub:"):
        return f"{constants.ENDPOINT}/{name.removeprefix('hf-hub:')}", Path(constants.HF_HUB_CACHE)
    own = timm.get_pretrained_cfg(name)
    if own and own.url and not own.hf_hub_id:
        return own.url, Path(torch.hub.get_dir()) / "checkpoints"
    return f"{constants.ENDPOINT}/{own.hf_hub_id if own else name}", Path(constants.HF_HUB_CACHE)


def _explain(name: str, error: Exception) -> UserError | DownloadError | None:
    """What a failed download means, in words; None for what is no failure of hub or network."""
    chain = _list_causes(error)
    source, cache = locate_source(name)
    host = socket.gethostname()
    otherwise = "model.name: local-dir:FOLDER" if ":" in name else "model.weights: FILE.safetensors"
    if any(isinstance(cause, hub_errors.OfflineModeIsEnabled) for cause in chain):
        return UserError(
            f"model.name = {name!r}: its files are not in the cache {cache} on {host}, and HF_HUB_OFFLINE is set, as "
            "in all jobs that doccls-launch submits. Let HF_HOME name a folder that this machine shares with the one "
            f"that downloads, or set {otherwise}"
        )
    status = next((status for cause in chain if (status := _find_status(cause))), None)
    if status is not None and status < 500 and status not in _TRANSIENT_STATUSES:
        return UserError(
            f"model.name = {name!r}: {source} answers with HTTP status {status}: there is no such file, or it is "
            f"closed to you (HF_TOKEN opens it). Take another model.name, or set {otherwise}"
        )
    if status is None and _is_local(error):
        return None
    return DownloadError(
        f"the files of {name!r} could not be fetched from {source} by {host} ({_find_reason(error)}). Without a "
        f"network: HF_HUB_OFFLINE=1 and a filled cache (HF_HOME, now {constants.HF_HOME}), or {otherwise}"
    )


def _is_local(error: Exception) -> bool:
    """Whether it is of a file on this machine."""
    if not isinstance(error, OSError) or isinstance(error, hub_errors.LocalEntryNotFoundError):
        return False
    return isinstance(error, FileNotFoundError) or error.filename is not None or error.errno in _FULL_DISK


def _find_reason(error: Exception) -> str:
    """What lies at the bottom of it, in one line; the hub's client says little above."""
    first = _list_causes(error)[-1]
    return str(first).strip().partition("\n")[0] or type(first).__name__


def _list_causes(error: BaseException) -> list[BaseException]:
    """The error, and what it was raised from, outermost first."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def _find_status(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, if it did."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status

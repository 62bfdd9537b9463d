"""`python -m doccls.reporting.wandb_process`: one W&B run, told by lines of JSON on the standard input.

First a `WandbRun`, then `{"values": {...}, "step": n}` each, last `{"exit_code": n}`; an input that ends without it is
a training that crashed. What is worth a line in the training's log is printed. W&B waits long for a network that is
lost, also while Python ends: FINISH_S after the last line the process ends, whatever W&B does.
"""

import json
import netrc
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

import psutil

from doccls.system.signals import STOP_SIGNALS

FINISH_S = 30.0
"""How long W&B may take to send the rest."""
_START_TIMEOUT_S = 20
_CONNECT_TIMEOUT_S = 3
_Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbRun:
    """What a W&B run is started with."""

    project: str
    entity: str | None
    group: str
    name: str
    config: dict[str, Any]
    folder: str
    """In which W&B makes its own, `wandb/`."""


def main() -> int:
    """Read the run and its numbers from the standard input; the exit code is 0."""
    for number in STOP_SIGNALS:  # they are for the process that trains, whose end is the end of the input
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_SILENT", "true")  # the setting of that name comes too late for the login's words
    run = WandbRun(**json.loads(sys.stdin.readline()))
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    receiver = threading.Thread(target=_receive, args=(messages,), daemon=True)
    receiver.start()
    track(run, iter(messages.get, None), _say)
    receiver.join()  # W&B may be done with much sooner
    return 0


def track(run: WandbRun, messages: Iterable[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Pass the messages on to W&B, the last one included; whatever W&B raises is said once, and the rest dropped."""
    started = _start(run, say)
    if started is None:
        return
    try:
        for message in messages:
            if "exit_code" in message:
                started.finish(exit_code=message["exit_code"])
                return
            started.log(message["values"], step=message["step"])
    except Exception as error:  # noqa: BLE001 (whatever ails it, training goes on)
        say(f"W&B failed ({type(error).__name__}: {error}); training goes on without it")


def _receive(messages: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Take what is told at once, so that it is kept here and not there; after the last, watch the time."""
    for line in sys.stdin:
        message = json.loads(line)
        messages.put(message)
        if "exit_code" in message:
            break
    else:
        messages.put({"exit_code": 1})
    timer = threading.Timer(FINISH_S, _give_up)
    timer.daemon = True
    timer.start()


def _give_up() -> None:
    _say(f"W&B has not sent everything within {FINISH_S:g} s: `wandb sync` sends it from the run's folder wandb/")
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may listen any more
        os.write(1, f"{text}\n".encode())


def _start(run: WandbRun, say: Callable[[str], None]) -> Any:
    try:
        import wandb
    except ImportError as error:
        say(f"W&B is not there ({error}); training goes on")
        return None
    for mode in _choose_modes():
        try:
            started = wandb.init(
                project=run.project,
                entity=run.entity,
                group=run.group,
                name=run.name,
                job_type="fold",
                config=run.config,
                dir=run.folder,
                mode=mode,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=_START_TIMEOUT_S,
                    disable_git=True,
                    save_code=False,
                    program="doccls.train",
                ),
            )
        except Exception as error:  # noqa: BLE001 (as above)
            say(f"W&B {mode} did not start ({type(error).__name__}); training goes on")
            continue
        say(f"W&B {mode} | group={run.group} name={run.name}")
        return started
    return None


def _choose_modes() -> tuple[_Mode, ...]:
    """Online, if there is a key and the server answers, with offline to fall back on; else offline at once."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return ("disabled",)
    if os.environ.get("WANDB_MODE") == "offline":
        return ("offline",)
    import wandb

    try:
        url = urlsplit(wandb.setup().settings.base_url)  # of the environment or a settings file, else W&B's own
    except ValueError:  # the environment holds settings that W&B refuses
        return ("offline",)
    return ("online", "offline") if url.hostname and _has_key(url.hostname) and _answers(url) else ("offline",)


def _has_key(host: str) -> bool:
    """From the environment or .netrc. (`wandb.login` would ask the server, and wait long where there is none.)"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
        return any(stored.authenticators(name) is not None for name in (host, "api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: SplitResult) -> bool:
    if getproxies():  # the way out is not a plain connection: leave it to W&B to find out
        return True
    try:
        with socket.create_connection((url.hostname, url.port or 443), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())

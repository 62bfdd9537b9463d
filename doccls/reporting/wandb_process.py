"""`python -m doccls.reporting.wandb_process`: one W&B run, controlled by JSON lines on the standard input.

First a `WandbRun`, then `{"values": {...}, "step": n}` per step, last `{"exit_code": n}`; an input that ends without it
means that training crashed. Lines for the training's log are printed. W&B waits long for a lost network, also while
Python exits: so this process exits FINISH_S after the last line, whatever W&B does.
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
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

import psutil

from doccls.config.paths import find_output_problem
from doccls.errors import UserError
from doccls.system.signals import STOP_SIGNALS
from doccls.system.temporary import choose_socket_folder

FINISH_S = 30.0  # how long W&B may take to send the remaining data
_START_TIMEOUT_S = 20
_CONNECT_TIMEOUT_S = 3
_MAX_REASON_LENGTH = 300
# Variables that say which run this is, or to which process of W&B's it belongs. Left by another run (of a notebook, a
# sweep, a job template), they would merge folds into one W&B run or refuse them.
_FOREIGN_VARIABLES = (
    "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_RUN_GROUP", "WANDB_NAME",
    "WANDB_RUN_NAME", "WANDB_JOB_TYPE", "WANDB_RUN_JOB_TYPE", "WANDB_RUN_DIR", "WANDB_RUN_STORAGE_ID", "WANDB_PROJECT",
    "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SERVICE",
)  # fmt: skip
_Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbRun:
    """The arguments of a W&B run."""

    id: str  # unique in the project; equal for all starts of a fold
    project: str
    entity: str | None
    group: str
    name: str
    config: dict[str, Any]
    folder: str  # parent of W&B's own folder, `wandb/`


def main() -> int:
    """Read the run and its values from the standard input; return exit code 0."""
    for number in STOP_SIGNALS:  # only the training process handles them; its exit closes the input
        signal.signal(number, signal.SIG_IGN)
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.setdefault("WANDB_SILENT", "true")  # the setting `silent` comes too late for the login's output
    run = WandbRun(**json.loads(sys.stdin.readline()))
    _choose_folders(run)
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    receiver = threading.Thread(target=_receive, args=(messages,), daemon=True)
    receiver.start()
    track(run, iter(messages.get, None), _print)
    receiver.join()  # it may outlast W&B
    return 0


def track(run: WandbRun, messages: Iterable[dict[str, Any]], report: Callable[[str], None]) -> None:
    """Pass the messages to W&B up to the exit code; report an error of W&B once, and drop all later messages."""
    wandb_run = _start(run, report)
    if wandb_run is None:
        return
    try:
        for message in messages:
            if "exit_code" in message:
                wandb_run.finish(exit_code=message["exit_code"])
                return
            wandb_run.log(message["values"], step=message["step"])
    except Exception as error:  # noqa: BLE001 (no error of W&B may stop training)
        report(f"W&B failed ({_describe(error)}); training continues without it")


def _receive(messages: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Queue each message immediately, so that the pipe never fills; start the time limit after the last one."""
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
    _print(f"W&B has not sent everything within {FINISH_S:g} s: send it with `wandb sync` from the run's folder wandb/")
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def _print(text: str) -> None:
    with suppress(OSError):  # the reader may have exited
        os.write(1, f"{text}\n".encode())


def _start(run: WandbRun, report: Callable[[str], None]) -> Any:
    try:
        import wandb
    except ImportError as error:
        report(f"W&B is not installed ({error}); training continues without it")
        return None
    for mode in _choose_modes():
        try:
            wandb_run = wandb.init(
                id=run.id,
                resume="allow" if mode == "online" else None,  # offline, W&B continues a run when it is synced
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
            report(f"W&B {mode} did not start ({_describe(error)}); training continues")
            continue
        report(f"W&B {mode} | group={run.group} name={run.name}")
        return wandb_run
    return None


def _describe(error: Exception) -> str:
    """Describe an error in W&B's own words, as one line without the API key."""
    text = " ".join(str(error).split())
    key = os.environ.get("WANDB_API_KEY")
    if key:
        text = text.replace(key, "***")
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return f"{type(error).__name__}: {text[:_MAX_REASON_LENGTH]}" if text else type(error).__name__


def _choose_folders(run: WandbRun) -> None:
    """Have W&B bind its socket where that is possible, and write beside the run what can't go to the home folder."""
    with suppress(UserError):
        os.environ["TMPDIR"] = str(choose_socket_folder())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "wandb")  # noqa: PTH111 (raises)
    if find_output_problem(caches) is not None:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(name, str(Path(run.folder, "wandb", "cache")))


def _choose_modes() -> tuple[_Mode, ...]:
    """Return the modes to try: online, then offline, if there is a key and the server answers, else offline."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return ("disabled",)
    if os.environ.get("WANDB_MODE") == "offline":
        return ("offline",)
    import wandb

    try:
        url = urlsplit(wandb.setup().settings.base_url)  # from the environment or a settings file, else W&B's own
    except ValueError:  # the environment holds settings that W&B refuses
        return ("offline",)
    return ("online", "offline") if url.hostname and _has_key(url.hostname) and _is_reachable(url) else ("offline",)


def _has_key(host: str) -> bool:
    """Return whether the environment or .netrc has a key; `wandb.login` would wait long for an unreachable server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
        return any(entries.authenticators(name) is not None for name in (host, "api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def _is_reachable(url: SplitResult) -> bool:
    if getproxies():  # a plain connection would not show it: let W&B try
        return True
    try:
        with socket.create_connection((url.hostname, url.port or 443), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())

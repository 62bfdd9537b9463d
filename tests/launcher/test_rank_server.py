"""Ranks from a rank server: like fresh interpreters, with their bytes, and independent of the server's fate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO
from unittest.mock import patch

import psutil
import pytest
from forked_launcher import SERVER_THREAD
from launches import Launch, assert_none_left, await_event, finish, launch, start_command, trains
from rank_launcher import clean_environment
from tiny_runs import PLAIN, RICH, Run, Trainer

from doccls.system.lifeline import PARENT
from launcher import forking, local
from launcher.forking import ForkedRank, RankServer
from launcher.plan import RankCommand

PROGRAM = "rank_probe"
HERE = Path(__file__).parent
OF_RANKS = {"OMP_NUM_THREADS": "2", "ACCELERATE_USE_CPU": "true"}


class Probe:
    """A rank server of this process, whose ranks run `rank_probe`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reports = folder, list[str]()
        self.server = RankServer(sys.executable, self.environment(), OF_RANKS, self.reports.append)
        self.server.await_ready()

    @staticmethod
    def environment() -> dict[str, str]:
        path = os.pathsep.join([str(HERE), clean_environment()["PYTHONPATH"]])
        variables = {name: value for name, value in clean_environment().items() if not name.startswith("PYTEST_")}
        return variables | {"PYTHONPATH": path}

    def start(self, how: str, word: str, **variables: str) -> tuple[local.Rank, Path]:
        command = RankCommand((sys.executable, "-m", PROGRAM, word), OF_RANKS | variables)
        console = self.folder / f"{len(list(self.folder.iterdir()))}.txt"
        server = self.server if how == "forked" else None
        with patch.dict(os.environ, self.environment(), clear=True):  # pytest changes its own
            return local._start_rank(command, console, {PARENT: str(os.getpid())}, server), console


def start_probe_server(
    python: str, environment: Mapping[str, str], served: "object", output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    descriptor = served.fileno()  # type: ignore[attr-defined]
    return subprocess.Popen(
        (python, "-m", PROGRAM, "serve", str(descriptor)), env=environment, stdin=subprocess.DEVNULL, stdout=output,
        stderr=output, pass_fds=[descriptor], start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(forking, "start_server", start_probe_server)
        patches.setattr(forking, "PROGRAM", PROGRAM)
        probe = Probe(tmp_path_factory.mktemp("probe"))
        yield probe
        probe.server.close()


def test_forked_rank_is_like_fresh_interpreter(probe: Probe) -> None:
    found = {}
    for how in ("forked", "forked again", "fresh"):
        rank, console = probe.start(how.split()[0], "describe", RANK="1", CUDA_VISIBLE_DEVICES="")
        assert isinstance(rank, ForkedRank) == (how != "fresh"), probe.reports
        assert rank.wait(100) == 3
        text, *last = console.read_text().splitlines()
        found[how] = json.loads(text.replace(str(console), "CONSOLE"))
        assert last == ["thread finished", "exited normally"]
    assert found["fresh"]["environment"]["RANK"] == "1"
    randoms = [values.pop("random") for values in found.values()]
    assert all(len(set(numbers)) == 3 for numbers in zip(*randoms, strict=True))
    for key, value in found["fresh"].items():
        assert found["forked"][key] == found["forked again"][key] == value, key
    assert probe.reports == []


def test_forked_rank_leaves_its_memory_to_the_kernel_unless_it_fails(probe: Probe) -> None:
    """Python would copy what it shares with the server as it takes it apart, for longer than a fold needs to start."""
    consoles = {}
    for how, word in (("forked", "keep"), ("fresh", "keep"), ("forked", "fail")):
        rank, consoles[how, word] = probe.start(how, word)
        assert rank.wait(100) == (1 if word == "fail" else 0)
    assert consoles["forked", "keep"].read_text() == "" and consoles["fresh", "keep"].read_text() == "taken apart\n"
    assert consoles["forked", "fail"].read_text().endswith("ValueError: it fails\ntaken apart\n")


def test_ranks_go_on_after_server_and_next_ones_start_fresh_until_new_server_is_ready(probe: Probe) -> None:
    ranks = [rank for rank, _ in [probe.start("forked", "sleep")]]
    try:
        server = probe.server._server
        assert server is not None
        server.process.kill()
        server.process.wait()
        ranks.append(probe.start("forked", "sleep")[0])
        line = "[WARNING] the rank server has ended (killed by SIGKILL); ranks start fresh until a new one is ready"
        assert probe.reports == [line]
        probe.server.await_ready()
        ranks.append(probe.start("forked", "sleep")[0])
        assert [isinstance(rank, ForkedRank) for rank in ranks] == [True, False, True]
        assert [rank.poll() for rank in ranks] == [None] * 3 and probe.reports == [line]
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [-signal.SIGKILL] * 3


def start_as_user(trainer: Trainer, folder: Path, sets: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Start `python -m launcher run`, with a fresh interpreter for the launcher and a real server."""
    folder.mkdir()
    command = [sys.executable, "-m", "launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny"]
    with (folder / "out.txt").open("wb") as out:
        return subprocess.Popen(command, cwd=folder, env=clean_environment(), stdout=out, stderr=out)


def list_server_lines(done: Launch) -> list[str]:
    return [line for line in done.log if "rank server" in line]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fresh_ranks_and_forked_ones_give_the_same_bytes(trainer: Trainer, ranks: int) -> None:
    folder = trainer.new_folder()
    sets = (*RICH, "data.valid_fold=2", f"train.num_processes={ranks}", "train.cpu_threads=2")
    forked = launch(trainer, sets, "--slots", str(ranks), folder=folder)
    assert forked.code == 0 and list_server_lines(forked) == [], forked.out + forked.err
    names = ("ckpt/best_fold2.pth", "oof/parts/fold2.safetensors")
    expected = [(forked.run.root / name).read_bytes() for name in names]
    shutil.rmtree(folder)
    # For one rank there is no server; for two, it has a thread and forks nothing.
    variables = {"DOCCLS_TEST_FAULT": "error"} | ({SERVER_THREAD: "yes"} if ranks == 2 else {})
    words = ("run", *trainer.arguments(sets, folder), "--run-id", "tiny", "--slots", str(ranks))
    words += ("--start", "fresh") if ranks == 1 else ()
    process = start_command(folder, "fault_train:train_with_fault", "launcher", *words, **variables)
    fresh = finish(process, folder)  # only forked ranks have the fault
    assert fresh.code == 0, fresh.out + fresh.err
    line = "[WARNING] ranks start fresh, since the rank server has 2 threads after its imports (python)"
    assert list_server_lines(fresh) == ([] if ranks == 1 else [line])
    assert [(fresh.run.root / name).read_bytes() for name in names] == expected


def test_server_that_is_killed_ends_no_fold_and_is_replaced(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    command = ("run", *trainer.arguments((*PLAIN, "train.epochs=12"), folder), "--run-id", "tiny", "--slots", "1")
    process = start_command(folder, "doccls.train:main", "launcher", *command)
    await_event(lambda: not process.is_alive() or trains(folder), "an epoch", folder)
    (rank,) = json.loads((Run([], folder).root / "launch.json").read_text())["attempts"][0]["pids"]
    children = [child.pid for child in psutil.Process(process.pid).children()]
    (server,) = [pid for pid in children if os.getsid(pid) != pid]  # the template leads the session of its servers
    assert len(children) == 3 and rank in children
    os.kill(server, signal.SIGKILL)
    done = finish(process, folder)
    assert done.code == 0, done.out + done.err
    line = "[WARNING] the rank server has ended (killed by SIGKILL); ranks start fresh until a new one is ready"
    assert list_server_lines(done) == [line]
    assert [line.split()[2] for line in done.log if line.startswith("[LAUNCH]") and "started" in line] == [*"012"]
    assert_none_left(folder)


def test_server_ends_with_launcher_that_is_killed_while_it_imports(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    launcher = start_as_user(trainer, folder, PLAIN)
    servers = list[psutil.Process]()
    try:
        while not servers:
            assert launcher.poll() is None, (folder / "out.txt").read_text()
            time.sleep(0.02)
            servers = [child for child in psutil.Process(launcher.pid).children() if imports_torch(child)]
        servers[0].suspend()  # so that it can't end because its socket is closed
        launcher.kill()
        launcher.wait()
        assert psutil.wait_procs(servers, timeout=30)[1] == []
    finally:
        launcher.kill()
        launcher.wait()
        for server in servers:
            with suppress(psutil.NoSuchProcess):
                server.kill()


def imports_torch(process: psutil.Process) -> bool:
    with suppress(OSError):  # another child of the launcher, such as git, has just ended
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    return False

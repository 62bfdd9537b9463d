"""Ranks as `doccls-launch run` starts them: interpreters with environment, session, console and process group.

The other tests of this suite fork their ranks (`forked_launcher`).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import local
from launcher.local import LocalProcesses
from launcher.plan import RankCommand

_PROGRAM = """
import json, os, sys
found = {name: os.environ.get(name) for name in ("RANK", "OMP_NUM_THREADS", "DOCCLS_PARENT_PID", "KEPT")}
print(json.dumps([os.getppid(), os.getsid(0) == os.getpid(), sys.stdin.read(), found]), flush=True)
print("to stderr", file=sys.stderr, flush=True)
"""


def test_rank_has_own_session_no_input_and_given_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")  # of an enclosing launcher, not of the rank
    monkeypatch.setenv("KEPT", "yes")
    console = tmp_path / "console" / "fold1_rank0.txt"
    command = RankCommand((sys.executable, "-c", _PROGRAM), {"OMP_NUM_THREADS": "3"})
    for _ in range(2):
        assert local._start_rank(command, console, {"DOCCLS_PARENT_PID": "4711"}).wait(60) == 0
    found = {"RANK": None, "OMP_NUM_THREADS": "3", "DOCCLS_PARENT_PID": "4711", "KEPT": "yes"}
    lines = console.read_text().splitlines()
    assert [json.loads(line) for line in lines[::2]] == [[os.getpid(), True, "", found]] * 2
    assert lines[1::2] == ["to stderr"] * 2


def test_kill_ends_rank_with_its_children(tmp_path: Path) -> None:
    script = "sleep 600 & echo $!; wait"
    console = tmp_path / "console.txt"
    process = local._start_rank(RankCommand(("sh", "-c", script), {}), console, {})
    fold = LocalProcesses((process,))
    try:
        while not console.read_text().endswith("\n"):  # pytest's timeout bounds it
            assert process.poll() is None
            time.sleep(0.02)
        child = psutil.Process(int(console.read_text()))
    finally:
        fold.kill()
    fold.wait()
    assert fold.poll() == (-signal.SIGKILL,)
    assert psutil.wait_procs([child], timeout=30)[1] == []

"""The commands that close the runs of a study while others train."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_standings import write_fold

from doccls.run.paths import RunPaths
from doccls.system import signals
from doccls.system.signals import Interrupted
from launcher.closing import Closings, Command, Ended, find_command

PRINT = [sys.executable, "-c", "import sys; print('x'); print('y', file=sys.stderr); sys.exit(int(sys.argv[1]))"]
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def test_commands_end_one_after_the_other() -> None:
    ended: list[Ended] = []
    closings = Closings(ended.append)
    with closings.stopping():
        for number in range(3):
            closings.add(f"run{number}", Command([*PRINT, str(number)]))
        closings.finish()
    assert [(end.run_id, end.code, sorted(end.output.split())) for end in ended] == [
        ("run0", 0, ["x", "y"]), ("run1", 1, ["x", "y"]), ("run2", 2, ["x", "y"]),
    ]  # fmt: skip


def test_polling_does_not_wait() -> None:
    ended: list[Ended] = []
    closings = Closings(ended.append)
    with closings.stopping():
        closings.poll()  # nothing to do
        closings.add("a", Command(SLEEP))
        closings.add("b", Command(SLEEP))
        closings.poll()
        closings.poll()
        assert ended == []
    # Both were stopped: one that ran, and one that had not begun.
    closings.poll()
    assert [end.run_id for end in ended] == ["a"] and ended[0].code < 0


def test_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    closings = Closings(lambda end: None)
    closings.add("a", Command(SLEEP))
    monkeypatch.setattr(signals, "_requested", 15)
    with pytest.raises(Interrupted), closings.stopping():
        closings.finish()


def test_command_that_can_not_start_is_reported_like_one_that_fails() -> None:
    ended: list[Ended] = []
    closings = Closings(ended.append)
    with closings.stopping():
        closings.add("a", Command(["/no/such/program"]))
        closings.add("b", Command([*PRINT, "0"]))
        closings.finish()
    assert [(end.run_id, end.code) for end in ended] == [("a", 1), ("b", 0)]
    assert "can't be started: " in ended[0].output and "/no/such/program" in ended[0].output


@pytest.mark.parametrize("valid_fold", ["all", 0])
def test_run_is_closed_once(valid_fold: str | int, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    output = SimpleNamespace(report=True)
    config = SimpleNamespace(data=SimpleNamespace(valid_fold=valid_fold), output=output)
    experiment: Any = SimpleNamespace(paths=paths, config=config)

    def write(path: Path, time_s: int) -> None:
        path.touch()
        os.utime(path, (time_s, time_s))

    paths.predictions_dir.mkdir(parents=True)
    write_fold(paths, 0, 0.5, None)
    write(paths.predictions(0), 10)
    if valid_fold == "all":
        assert find_command(experiment) == Command([sys.executable, "-m", "launcher", "merge", str(tmp_path)])
        write(paths.summary, 20)
    report = Command([sys.executable, "-m", "doccls", "report", str(tmp_path)], is_report=True)
    assert find_command(experiment) == report  # also if the merge was killed before it
    output.report = False
    assert find_command(experiment) is None
    output.report = True
    write(paths.report, 30)
    assert find_command(experiment) is None
    write(paths.predictions(0), 40)  # trained again
    assert find_command(experiment) is not None

"""Live views of launches: below the log at a terminal, from another shell, and the logs themselves."""

from pathlib import Path

import pytest
from launches import LAST, LAUNCH_S, ask, assert_same_bytes, await_event, finish, start, start_command, trains
from rank_launcher import start_ranks
from terminals import Terminal, show
from tiny_runs import PLAIN, Run, Trainer

SHORT = (*PLAIN, "train.epochs=1")
TABLE = "run tiny: "


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    return trainer.train(*SHORT)


def start_at(terminal: Terminal, trainer: Trainer, folder: Path, **variables: str):  # type: ignore[no-untyped-def]
    """Start a launch at the terminal."""
    words = ("launcher", "run", *trainer.arguments(SHORT, folder), "--run-id", "tiny", "--slots", "2")
    named = {"DOCCLS_TEST_CONSOLE": "terminal", "DOCCLS_TEST_TERMINAL": terminal.name, "TERM": "xterm", "NO_COLOR": "1"}
    return start_command(
        folder, "doccls.train:main", *words, starter="console_programs:launch", **(named | variables)
    )  # fmt: skip


def test_terminal_shows_the_folds_below_the_log(trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    with Terminal() as terminal:
        launched = finish(start_at(terminal, trainer, folder), folder)
        terminal.finish()
    assert launched.code == 0, terminal.output
    assert TABLE + "0 of 3 folds done" in terminal.output and "macro-F1 by epoch" in terminal.output
    # At the end there is only the log, each line of it once.
    closing = "[EXIT] training finished successfully (see logs/* for details)"
    assert [line for line in show(terminal.output) if line] == [line for line in [*launched.log, closing] if line]
    assert not any("\x1b" in line or line.startswith(TABLE) for line in launched.log)
    assert_same_bytes(undisturbed, launched.run)


def test_dumb_terminal_gets_only_lines(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    with Terminal() as terminal:
        launched = finish(start_at(terminal, trainer, folder, TERM="dumb"), folder)
        terminal.finish()
    assert (
        launched.code == 0 and TABLE not in terminal.output and "[LAUNCH] fold 0 on cpu 0: started" in terminal.output
    )


@pytest.mark.parametrize("fault", ["stop", "hang_up"])
def test_lost_terminal_stops_nothing(trainer: Trainer, undisturbed: Run, fault: str) -> None:
    folder = trainer.new_folder()
    with Terminal() as terminal:
        process = start_at(terminal, trainer, folder)
        await_event(lambda: TABLE in terminal.output, "the table", folder)
        getattr(terminal, fault)()
        launched = finish(process, folder)
    assert launched.code == 0
    assert launched.log[-2:] == ["[EXIT] TRAINING SUCCESS code=0", LAST]
    assert_same_bytes(undisturbed, launched.run)


def test_watch_and_followed_logs_end_with_the_run(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    process = start(trainer, (*PLAIN, "train.epochs=6"), folder, "--slots", "1")
    await_event(lambda: trains(folder), "the second epoch", folder)
    root = str(Run([], folder).root)
    followers = {
        name: start_ranks("launcher.cli:main", ["logs", root, "-f", *words], folder / name)[0]
        for name, words in (("launch_log", ()), ("fold_log", ("--fold", "0")))
    }
    events = ask(folder, "status", root, "--watch").splitlines()
    launched = finish(process, folder)
    assert launched.code == 0
    assert events[0].startswith("[STATUS] fold 0: ") and events[-1] == "[STATUS] run tiny: 3 of 3 folds done"
    for fold in range(3):
        score = launched.run.predictions(fold).info.macro_f1
        assert f"[STATUS] fold {fold}: done macro_f1={score:.5f}" in events
    for name, follower in followers.items():
        follower.join(LAUNCH_S)
        assert follower.exitcode == 0, name
    (fold_log,) = folder.glob("logs/*_fold0.log")
    assert (folder / "fold_log" / "rank0.out").read_text() == fold_log.read_text()
    assert (folder / "launch_log" / "rank0.out").read_text().splitlines()[-len(launched.log) :] == launched.log
    assert ask(folder, "status", root, "--watch").splitlines()[-1] == events[-1]  # of a finished run
    assert ask(folder, "logs", root).endswith(f"{LAST}\n")

"""The lock: one process at a time, refused in words that name the holder, free as soon as that process is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from doccls.errors import UserError
from doccls.system import lock
from doccls.system.lifeline import LAUNCHED
from doccls.system.lock import LockError, find_holder, hold_lock

WHAT = "run r is being launched"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "live" / "launch.lock"


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the lock until a line, or its end, comes to its input."""
    code = (
        "import sys; from pathlib import Path; from doccls.system.lock import hold_lock\n"
        f"with hold_lock(Path({str(path)!r}), {WHAT!r}):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        "print('freed', flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(30)
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a lock takes no time."""
    now_s = [100.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now_s.append(now_s.pop() + seconds))


def refuse(path: Path) -> str:
    with pytest.raises(LockError) as caught, hold_lock(path, "this test"):
        pytest.fail("two hold it")
    return str(caught.value)


# --- one at a time ---------------------------------------------------------------------------------------------------


def test_another_process_is_refused_with_who_holds_it(path: Path) -> None:
    with another_process(path) as process:
        told = refuse(path)
        assert told.startswith(f"{WHAT} by process {process.pid} on {socket.gethostname()} since 20")
        assert str(path) in told
        assert refuse(path) == told, "the one refused leaves the holder's words as they are"


def test_the_same_process_does_not_get_it_twice(path: Path) -> None:
    with hold_lock(path, WHAT):
        assert f"{WHAT} by process {os.getpid()}" in refuse(path)
    with hold_lock(path, WHAT):
        pass


def test_who_is_refused_has_to_mend_something() -> None:
    assert issubclass(LockError, UserError)


def test_it_is_free_when_the_block_ends_and_nothing_stays(path: Path) -> None:
    with another_process(path) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "freed\n"
        assert process.poll() is None and list(path.parent.iterdir()) == []
        with hold_lock(path, WHAT):
            pass


def test_who_waits_gets_it_when_its_holder_has_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(path) as process:
        assert process.stdin is not None
        looks: list[float] = []

        def look(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 4:
                process.kill()
                process.wait(30)

        monkeypatch.setattr(lock.time, "sleep", look)
        with hold_lock(path, WHAT, wait_s=3600.0):
            assert len(looks) >= 4


def test_who_has_waited_long_enough_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now_s.append(now_s.pop() + seconds))
    with another_process(path) as process:
        with pytest.raises(LockError, match=f"by process {process.pid} "), hold_lock(path, WHAT, wait_s=30.0):
            pytest.fail("two hold it")
        assert 130.0 <= now_s[0] < 132.0


def test_it_is_free_when_an_error_leaves_the_block(path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), hold_lock(path, WHAT):
        raise RuntimeError("broken")
    with hold_lock(path, WHAT):
        pass


def test_a_process_that_is_killed_frees_it(path: Path) -> None:
    with another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert path.read_text() != ""
        with hold_lock(path, WHAT):
            pass


def test_locks_of_different_files_do_not_meet(path: Path) -> None:
    with hold_lock(path, WHAT), hold_lock(path.with_name("other.lock"), "run s"):
        pass


def test_the_folder_may_be_removed_while_the_lock_is_held(path: Path) -> None:
    """As `doccls store clear` does."""
    with hold_lock(path, WHAT):
        path.unlink()
        path.parent.rmdir()
    with hold_lock(path, "the next one"):
        assert "the next one by process" in refuse(path)


def test_who_waits_goes_on_when_the_folder_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holding, left = hold_lock(path, WHAT), []
    holding.__enter__()

    def sleep(seconds: float) -> None:
        if not left:
            left.append(path.unlink())
            path.parent.rmdir()
            holding.__exit__(None, None, None)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with hold_lock(path, "this test", wait_s=3600.0):
        assert "this test by process" in refuse(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"what": "x"}', '{"other": 1}', "null", "3"])
def test_a_holder_that_has_not_yet_described_itself_is_waited_for(
    path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with hold_lock(path, WHAT):
        request.getfixturevalue("quick_waits")
        path.write_text(text)
        assert "another process has just begun to work on it" in refuse(path)
        assert "has just begun to work on it" in capsys.readouterr().err
        assert find_holder(path) is None


def test_a_token_that_would_lead_out_of_the_folder_is_not_followed(path: Path) -> None:
    write_claim(path, os.getpid(), age_s=4000.0, token="../../elsewhere")
    with hold_lock(path, "this test"):
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("in the way")
    with (
        pytest.raises(LockError, match=r"live/x\.lock: can't be taken: "),
        hold_lock(tmp_path / "live" / "x.lock", "x"),
    ):
        pytest.fail("went on")


@pytest.mark.parametrize("late", ["write", "short write", "close"])
def test_a_full_disk_refuses_the_lock_and_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    close = os.close

    def fail(descriptor: int, *_: object) -> int:
        if late == "short write":
            return os.pwrite(descriptor, b'{"wh', 0)
        if late == "close":
            close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, late.split()[-1], fail)
        with pytest.raises(LockError, match="can't be taken: No space left"), hold_lock(path, "x"):
            pytest.fail("went on")
    assert list(path.parent.iterdir()) == []


# --- a holder that is dead -------------------------------------------------------------------------------------------


def write_claim(path: Path, pid: int, age_s: float = 0.0, **changes: str) -> str:
    """The claim of a process of this machine, or of another by `changes`; its token."""
    path.parent.mkdir(exist_ok=True)
    holder = replace(lock._describe_self(WHAT), pid=pid, since="2026-01-02T03:04:05")
    holder = replace(holder, started=lock._read_start(pid) or "1")
    holder = replace(holder, **changes)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return holder.token


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait(30)
    return process.pid


@pytest.mark.parametrize(
    ("age_s", "changes"),
    [
        (0.0, {}),
        (4000.0, {"host": "elsewhere"}),
        (4000.0, {"boot": "of another start"}),
        (4000.0, {"namespace": "pid:[1]"}),
    ],
)
def test_the_lock_of_a_dead_process_is_taken_over(
    path: Path, dead_pid: int, age_s: float, changes: dict[str, str]
) -> None:
    write_claim(path, dead_pid, age_s, **changes)
    assert find_holder(path) is None
    with hold_lock(path, "this test") as held:
        held.check()
        assert json.loads(path.read_text())["what"] == "this test"
        assert "this test by process" in refuse(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


def test_the_lock_of_a_process_that_is_alive_is_not(path: Path) -> None:
    write_claim(path, os.getpid(), age_s=1000.0)
    before = path.read_bytes()
    with pytest.raises(LockError, match="it lives"), hold_lock(path, "this test"):
        pytest.fail("two hold it")
    assert path.read_bytes() == before


def test_a_process_that_the_system_hides_is_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's, where /proc is mounted with hidepid: there is no /proc/PID, and no right to send a signal."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_claim(path, os.getpid(), age_s=4000.0)
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "kill", kill)
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
        patch.setattr(lock.psutil, "Process", lambda pid: (_ for _ in ()).throw(psutil.NoSuchProcess(pid)))
        assert lock._read_start(os.getpid()) == ""
    monkeypatch.setattr(lock, "_read_start", lambda pid: "")
    assert "it lives" in refuse(path)


def test_a_process_that_has_the_holders_number_is_not_taken_for_it(path: Path) -> None:
    """As in a container that is started anew: the first process there is always number 1."""
    write_claim(path, os.getpid(), started="another time")
    with hold_lock(path, "this test"):
        assert "this test by process" in refuse(path)


def test_one_that_died_before_it_described_itself_holds_nothing(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    os.utime(path, (0, 0))
    assert find_holder(path) is None
    with hold_lock(path, "this test"):
        assert "this test by process" in refuse(path)


def test_a_living_holder_whose_file_server_was_away_keeps_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look finds it silent for two minutes; the next one finds its sign of life."""
    write_claim(path, 1, age_s=200.0, host="elsewhere")
    now_s = [100.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if now_s[0] > 105.0:
            os.utime(path)

    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(LockError, match="it seems to live"), hold_lock(path, "this test"):
        pytest.fail("two hold it")


@pytest.mark.parametrize("lives", [True, False])
def test_a_silent_holder_of_another_machine_is_watched(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lives: bool
) -> None:
    write_claim(path, 1, age_s=60.0, host="elsewhere")
    now_s = [100.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if lives and now_s[0] > 110.0:
            os.utime(path)

    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(lock, "_measure_silence_s", lambda claim: now_s[0] - 40.0)
    if lives:
        with pytest.raises(LockError, match="on elsewhere since.*it seems to live"), hold_lock(path, "this test"):  # noqa: RUF043
            pytest.fail("two hold it")
    else:
        with hold_lock(path, "this test"):
            assert now_s[0] > 160.0
    assert capsys.readouterr().err.count("waiting for a sign of life") == 1


def test_a_holder_renews_its_file_until_another_has_taken_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_S", 0.01)
    looked: list[bytes] = []
    parse = lock._parse

    def note(text: bytes) -> lock.Holder | None:
        looked.append(text)
        return parse(text)

    monkeypatch.setattr(lock, "_parse", note)
    with hold_lock(path, WHAT):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:  # pytest's timeout bounds it
            time.sleep(0.01)
        write_claim(path.with_name("its file"), 1, host="elsewhere")
        os.utime(path.with_name("its file"), (0, 0))
        path.with_name("its file").replace(path)
        before = len(looked)
        while len(looked) < before + 3:
            time.sleep(0.01)
        assert path.stat().st_mtime == 0
    assert path.exists(), "it is the other's to remove"


@pytest.mark.parametrize("gone", [False, True])
def test_who_was_suspended_for_long_notices_that_its_lock_was_taken(path: Path, gone: bool) -> None:
    with hold_lock(path, WHAT) as held:
        held.check()
        if gone:
            path.unlink()
        else:
            write_claim(path.with_name("its file"), os.getpid(), host="elsewhere")
            path.with_name("its file").replace(path)
        with pytest.raises(LockError, match="was removed" if gone else "on elsewhere since"):
            held.check()


def test_a_file_server_that_does_not_answer_is_no_other_holder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with hold_lock(path, WHAT) as held, monkeypatch.context() as patch:
        patch.setattr(lock, "_read_claim", read)
        held.check()
        with pytest.raises(LockError, match="can't be read: Input/output error"):
            find_holder(path)


def test_a_file_that_is_replaced_as_it_is_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client says so: Stale file handle."""
    write_claim(path, os.getpid())
    parse, failed = lock._parse, []

    def fail_first(text: bytes) -> lock.Holder | None:
        if not failed:
            failed.append(path.unlink())
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return parse(text)

    monkeypatch.setattr(lock, "_parse", fail_first)
    with hold_lock(path, "this test") as held:
        held.check()


# --- many that come at once ------------------------------------------------------------------------------------------


def count_holders(path: Path, tries: int = 8) -> tuple[int, int]:
    """How many of so many threads get the lock and are refused, if none gives it back before all have tried."""
    held, refused = [], []
    all_tried = threading.Barrier(tries)

    def try_it() -> None:
        try:
            with hold_lock(path, WHAT):
                held.append(1)
                all_tried.wait(60)
        except LockError:
            refused.append(1)
            all_tried.wait(60)

    threads = [threading.Thread(target=try_it) for _ in range(tries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return len(held), len(refused)


def test_one_of_many_that_come_at_once_gets_it(path: Path) -> None:
    assert count_holders(path) == (1, 7)


def test_one_of_many_that_see_the_same_dead_holder_gets_it(path: Path, dead_pid: int) -> None:
    write_claim(path, dead_pid)
    assert count_holders(path) == (1, 7)


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Before this process first calls a function of the lock, another acts."""
    function, called = getattr(lock, name), []

    def first_act(*arguments: object) -> object:
        if not called:
            called.append(1)
            act()
        return function(*arguments)

    monkeypatch.setattr(lock, name, first_act)


def test_who_saw_a_dead_holder_whose_lock_was_taken_and_released_since_takes_it_from_nobody(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the dead one's lock between our look and our successor, and still holds it."""
    write_claim(path, dead_pid)
    with ExitStack() as others:
        interrupt(monkeypatch, "_take_over", lambda: others.enter_context(hold_lock(path, "the other")))
        assert "the other by process" in refuse(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


def test_a_takeover_that_fails_leaves_nothing_in_the_way(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_claim(path, dead_pid)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with pytest.raises(LockError, match="can't be taken: Operation not permitted"), hold_lock(path, WHAT):
            pytest.fail("went on")
    with hold_lock(path, "this test") as held:
        held.check()


def test_who_is_suspended_within_its_release_removes_nobodys_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read its own file; before it goes on, another process has taken the lock as from a dead one."""
    holding = hold_lock(path, WHAT)
    holding.__enter__()
    chain = lock._read_chain(path)
    other = lock._describe_self("the other")
    interrupt(monkeypatch, "_create", lambda: lock._take_over(path, chain, other))
    holding.__exit__(None, None, None)
    assert str(find_holder(path)).startswith("the other by process")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_takeover_that_its_process_did_not_finish_is_taken_over(path: Path, dead_pid: int) -> None:
    for alive in (True, False):
        token = write_claim(path, dead_pid)
        successor = path.with_name(f"{path.name}.{token}.next")
        write_claim(successor, os.getpid() if alive else dead_pid)
        if alive:
            assert "it lives" in refuse(path)
            successor.unlink()
    with hold_lock(path, "this test") as held:
        held.check()
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_holder_that_is_being_replaced_does_not_remove_the_others_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended for long, and wakes as another process takes its lock."""
    holding = hold_lock(path, WHAT)
    held = holding.__enter__()
    token = json.loads(path.read_text())["token"]
    write_claim(path.with_name(f"{path.name}.{token}.next"), os.getpid(), what="the other")
    with pytest.raises(LockError, match="the other by process"):
        held.check()
    holding.__exit__(None, None, None)
    assert str(find_holder(path)).startswith("the other by process")


# --- who holds it ----------------------------------------------------------------------------------------------------


def test_the_holder_of_another_process_is_found_and_not_hindered(path: Path) -> None:
    assert find_holder(path) is None
    with another_process(path) as process:
        holder = find_holder(path)
        assert holder is not None and (holder.what, holder.pid, holder.host) == (
            WHAT,
            process.pid,
            socket.gethostname(),
        )
        process.kill()
        process.wait(30)
        assert path.read_text() != "", "its words stay"
        assert find_holder(path) is None
    with hold_lock(path, "the next one"):
        pass


def test_a_holder_names_the_launch_that_started_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in ("", "4711"):
        monkeypatch.setenv(LAUNCHED, launch)
        with hold_lock(path, WHAT):
            holder = find_holder(path)
            assert holder is not None and holder.launch == launch


def test_a_folder_without_the_right_to_write_still_tells_who_holds_its_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write_claim(path, 1, host="elsewhere")
    monkeypatch.setattr(Path, "touch", touch)
    holder = find_holder(path)
    assert holder is not None and holder.host == "elsewhere"

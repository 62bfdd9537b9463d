"""The lock: one process at a time, refused in words that name the holder, free as soon as that process is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from doccls.errors import UserError
from doccls.run import lock
from doccls.run.lock import LockError, find_holder, hold_lock

WHAT = "run r is being launched"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "live" / "launch.lock"


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the lock until a line, or its end, comes to its input."""
    code = (
        "import sys; from pathlib import Path; from doccls.run.lock import hold_lock\n"
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


def test_it_is_free_when_the_block_ends_and_the_file_that_stays_means_nothing(path: Path) -> None:
    with another_process(path) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "freed\n"
        assert path.exists() and process.poll() is None
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


def test_who_waits_for_a_lock_that_its_holder_removes_makes_it_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `doccls store clear` does; removed between the wait's opening it and its taking it."""
    holding = hold_lock(path, WHAT)
    holding.__enter__()
    flock, left = lock.fcntl.flock, []

    def remove_first(file: int, how: int) -> None:
        if not left:
            left.append(path.unlink())
            path.parent.rmdir()
            holding.__exit__(None, None, None)
        flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", remove_first)
    with hold_lock(path, "this test", wait_s=3600.0):
        assert json.loads(path.read_text())["what"] == "this test"
        assert "this test by process" in refuse(path)


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


def test_a_longer_name_before_leaves_nothing_of_itself(path: Path) -> None:
    with hold_lock(path, "a very long description of what is going on" * 9):
        pass
    with hold_lock(path, "x"):
        assert json.loads(path.read_text())["what"] == "x"


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"what": "x"}', '{"other": 1}', "null", "3"])
def test_a_holder_that_has_not_yet_said_who_it_is_is_told_as_unknown(
    path: Path, request: pytest.FixtureRequest, text: str
) -> None:
    with hold_lock(path, WHAT):
        request.getfixturevalue("quick_waits")
        path.write_text(text)
        assert "another process has just begun to work on it" in refuse(path)


def test_other_errors_are_not_taken_for_a_file_system_without_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"), hold_lock(path, WHAT):
        pytest.fail("went on")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("in the way")
    with pytest.raises(LockError, match=r"live/x\.lock: can't be made"), hold_lock(tmp_path / "live" / "x.lock", "x"):
        pytest.fail("went on")


# --- a holder that is gone, and its lock is not ----------------------------------------------------------------------


def write_holder(path: Path, pid: int, age_s: float = 0.0, **changes: str) -> None:
    """The words of a process of this machine, or of another by `changes`."""
    path.parent.mkdir(exist_ok=True)
    holder = replace(lock._describe_self(WHAT), pid=pid, since="2026-01-02T03:04:05", token="its own")
    holder = replace(holder, started=lock._read_start(pid) or "1")
    path.write_text(json.dumps(asdict(replace(holder, **changes))))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait(30)
    return process.pid


@pytest.fixture
def held_by_a_server(path: Path) -> Iterator[None]:
    """The kernel's lock is held, by nobody that can be asked."""
    path.parent.mkdir()
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("held_by_a_server")
@pytest.mark.parametrize(
    ("age_s", "changes"),
    [
        (0.0, {}),
        (200.0, {"host": "elsewhere"}),
        (200.0, {"boot": "of another start"}),
        (200.0, {"namespace": "pid:[1]"}),
    ],
)
def test_the_lock_of_one_who_is_provably_dead_is_taken_over(
    path: Path, dead_pid: int, age_s: float, changes: dict[str, str]
) -> None:
    write_holder(path, dead_pid, age_s, **changes)
    with hold_lock(path, "this test"):
        assert json.loads(path.read_text())["what"] == "this test"
        assert "this test by process" in refuse(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("held_by_a_server")
def test_the_lock_of_a_process_that_is_seen_to_live_is_not(path: Path) -> None:
    write_holder(path, os.getpid(), age_s=1000.0)
    before = path.read_bytes()
    with pytest.raises(LockError, match="it lives"), hold_lock(path, "this test"):
        pytest.fail("two hold it")
    assert path.read_bytes() == before


@pytest.mark.usefixtures("held_by_a_server")
def test_the_words_of_a_dead_one_before_are_not_taken_for_those_of_a_holder_that_is_about_to_write_its_own(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_holder(path, dead_pid)
    between_looks = lock._WAIT_LOOK_S
    monkeypatch.setattr(
        lock.time, "sleep", lambda seconds: seconds == between_looks and write_holder(path, os.getpid())
    )
    with pytest.raises(LockError, match="it lives"), hold_lock(path, "this test"):
        pytest.fail("two hold it")


@pytest.mark.usefixtures("held_by_a_server")
def test_a_process_that_has_the_holders_number_is_not_taken_for_it(path: Path) -> None:
    """As in a container that is started anew: the first process there is always number 1."""
    write_holder(path, os.getpid(), started="another time")
    with hold_lock(path, "this test"):
        assert "this test by process" in refuse(path)


@pytest.mark.usefixtures("held_by_a_server")
@pytest.mark.parametrize("lives", [True, False])
def test_a_takeover_watches_whether_a_holder_of_another_machine_lives(
    path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    write_holder(path, 1, age_s=60.0, host="elsewhere")
    now_s = [100.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if lives and now_s[0] > 110.0:
            os.utime(path)

    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(lock, "_tell_age_s", lambda file: now_s[0] - 40.0)
    if lives:
        with pytest.raises(LockError, match="on elsewhere since.*it lives"), hold_lock(path, "this test"):  # noqa: RUF043
            pytest.fail("two hold it")
    else:
        with hold_lock(path, "this test"):
            assert now_s[0] > 160.0


def test_a_holder_that_lives_touches_its_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_KEEP_S", 0.01)
    looked: list[Path] = []
    holds = lock._holds
    monkeypatch.setattr(lock, "_holds", lambda holder, file: (looked.append(file), holds(holder, file))[1])
    with hold_lock(path, WHAT):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:  # pytest's timeout bounds it
            time.sleep(0.01)
        write_holder(path, 1, host="elsewhere")  # which has taken it: its sign of life is its own to give
        os.utime(path, (0, 0))
        before = len(looked)
        while len(looked) < before + 3:
            time.sleep(0.01)
        assert path.stat().st_mtime == 0


@pytest.mark.parametrize("gone", [False, True])
def test_who_was_suspended_for_long_notices_that_its_lock_was_taken(path: Path, gone: bool) -> None:
    with hold_lock(path, WHAT) as held:
        held.check()
        if gone:
            path.unlink()
        else:
            write_holder(path.with_name("its file"), os.getpid(), host="elsewhere")
            path.with_name("its file").replace(path)
        with pytest.raises(LockError, match="was removed" if gone else "on elsewhere since"):
            held.check()


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


def test_who_looks_at_the_wrong_moment_is_not_taken_for_a_holder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    with path.open("a") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with hold_lock(path, WHAT):
            assert WHAT in refuse(path)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_holder_is_who_says_so_unless_it_is_dead(path: Path, dead_pid: int) -> None:
    with hold_lock(path, WHAT):
        assert str(find_holder(path)).startswith(f"{WHAT} by process {os.getpid()} on ")
    assert find_holder(path) is None
    write_holder(lock._name_owner(path), dead_pid)
    assert find_holder(path) is None


# --- file systems without locks --------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks", "quick_waits")
def test_where_there_are_no_locks_the_words_count(path: Path, dead_pid: int) -> None:
    with hold_lock(path, WHAT):
        assert WHAT in refuse(path)
    with hold_lock(path, "another") as held:
        held.check()
    owner = lock._name_owner(path)
    assert not owner.exists()
    write_holder(owner, dead_pid)
    with hold_lock(path, "after one that was killed") as held:
        held.check()
    write_holder(owner, 1, host="elsewhere")
    assert "on elsewhere since" in refuse(path)
    write_holder(owner, 1, age_s=130.0, host="elsewhere")
    with hold_lock(path, "after one that is long silent"):
        pass
    owner.touch()
    assert "has just begun" in refuse(path)
    os.utime(owner, (0, 0))  # killed between the creation of its file and its words
    with hold_lock(path, "after one that said nothing"):
        pass


@pytest.mark.usefixtures("no_locks")
def test_of_two_that_take_the_place_of_one_dead_the_second_has_it(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = lock._name_owner(path)
    write_holder(owner, dead_pid)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: write_holder(owner, os.getpid()))  # it comes just after us
    assert WHAT in refuse(path)
    assert json.loads(owner.read_text())["token"] == "its own"


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_of_many_that_come_at_once_has_it(path: Path) -> None:
    held, refused = [], []
    all_tried = threading.Barrier(8)

    def try_it() -> None:
        try:
            with hold_lock(path, WHAT):
                held.append(1)
                all_tried.wait(60)
        except LockError:
            refused.append(1)
            all_tried.wait(60)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(held), len(refused)) == (1, 7)

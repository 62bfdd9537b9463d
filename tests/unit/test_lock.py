"""The lock: one process holds it at a time, others get an error that names it, and its end frees the lock."""

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
from doccls.system.holder import Holder, describe_self, parse_holder, read_start
from doccls.system.lifeline import LAUNCHED
from doccls.system.lock import LockError, find_holder, hold_lock

WHAT = "run r is being launched"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "live" / "launch.lock"


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock until it reads a line or the end of its input."""
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
    """Make waiting for a lock take no time."""
    now_s = [100.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now_s.append(now_s.pop() + seconds))


def refuse(path: Path) -> str:
    with pytest.raises(LockError) as caught, hold_lock(path, "this test"):
        pytest.fail("two processes hold it")
    return str(caught.value)


# --- one holder at a time --------------------------------------------------------------------------------------------


def test_error_names_the_holder_and_the_file(path: Path) -> None:
    with another_process(path) as process:
        message = refuse(path)
        assert message.startswith(f"{WHAT} by process {process.pid} on {socket.gethostname()} since 20")
        assert str(path) in message
        assert refuse(path) == message, "a failed attempt does not change the claim"


def test_same_process_cannot_take_it_twice(path: Path) -> None:
    with hold_lock(path, WHAT):
        assert f"{WHAT} by process {os.getpid()}" in refuse(path)
    with hold_lock(path, WHAT):
        pass


def test_lock_error_is_a_user_error() -> None:
    assert issubclass(LockError, UserError)


def test_end_of_block_frees_it_and_leaves_no_file(path: Path) -> None:
    with another_process(path) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "freed\n"
        assert process.poll() is None and list(path.parent.iterdir()) == []
        with hold_lock(path, WHAT):
            pass


def test_waiting_process_gets_it_when_the_holder_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(path) as process:
        assert process.stdin is not None
        waits_s: list[float] = []

        def sleep(seconds: float) -> None:
            waits_s.append(seconds)
            if len(waits_s) == 4:
                process.kill()
                process.wait(30)

        monkeypatch.setattr(lock.time, "sleep", sleep)
        with hold_lock(path, WHAT, wait_s=3600.0):
            assert len(waits_s) >= 4


def test_waiting_stops_at_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now_s.append(now_s.pop() + seconds))
    with another_process(path) as process:
        with pytest.raises(LockError, match=f"by process {process.pid} "), hold_lock(path, WHAT, wait_s=30.0):
            pytest.fail("two processes hold it")
        assert 130.0 <= now_s[0] < 132.0


def test_error_in_block_frees_it(path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), hold_lock(path, WHAT):
        raise RuntimeError("broken")
    with hold_lock(path, WHAT):
        pass


def test_killed_process_frees_it(path: Path) -> None:
    with another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert path.read_text() != ""
        with hold_lock(path, WHAT):
            pass


def test_locks_of_different_files_are_independent(path: Path) -> None:
    with hold_lock(path, WHAT), hold_lock(path.with_name("other.lock"), "run s"):
        pass


def test_folder_may_be_removed_while_the_lock_is_held(path: Path) -> None:
    """As `doccls store clear` does."""
    with hold_lock(path, WHAT):
        path.unlink()
        path.parent.rmdir()
    with hold_lock(path, "next holder"):
        assert "next holder by process" in refuse(path)


def test_waiting_continues_when_the_folder_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, removed = hold_lock(path, WHAT), []
    context.__enter__()

    def sleep(seconds: float) -> None:
        if not removed:
            removed.append(path.unlink())
            path.parent.rmdir()
            context.__exit__(None, None, None)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with hold_lock(path, "this test", wait_s=3600.0):
        assert "this test by process" in refuse(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"what": "x"}', '{"other": 1}', "null", "3"])
def test_holder_without_description_is_waited_for(
    path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with hold_lock(path, WHAT):
        request.getfixturevalue("quick_waits")
        path.write_text(text)
        assert "another process has just taken the lock" in refuse(path)
        assert "has just taken the lock" in capsys.readouterr().err
        assert find_holder(path) is None


def test_token_outside_the_folder_is_not_followed(path: Path) -> None:
    write_claim(path, os.getpid(), age_s=4000.0, token="../../elsewhere")
    with hold_lock(path, "this test"):
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("in the way")
    with (
        pytest.raises(LockError, match=r"live/x\.lock: can't be taken: "),
        hold_lock(tmp_path / "live" / "x.lock", "x"),
    ):
        pytest.fail("got the lock")


@pytest.mark.parametrize("call", ["write", "short write", "close"])
def test_full_disk_raises_and_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    close = os.close

    def fail(descriptor: int, *_: object) -> int:
        if call == "short write":
            return os.pwrite(descriptor, b'{"wh', 0)
        if call == "close":
            close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, call.split()[-1], fail)
        message = r"launch\.lock: can't be taken: No space left on device: \d\d\d bytes needed, \d.* free"
        with pytest.raises(LockError, match=message), hold_lock(path, "x"):
            pytest.fail("got the lock")
    assert list(path.parent.iterdir()) == []


# --- dead holders ----------------------------------------------------------------------------------------------------


def write_claim(path: Path, pid: int, age_s: float = 0.0, **changes: str) -> str:
    """Write the claim of a process on this machine, or with `changes` on another, and return its token."""
    path.parent.mkdir(exist_ok=True)
    holder = replace(describe_self(WHAT), pid=pid, since="2026-01-02T03:04:05")
    holder = replace(holder, started=read_start(pid) or "1")
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
        (4000.0, {"boot": "another boot"}),
        (4000.0, {"namespace": "pid:[1]"}),
    ],
)
def test_lock_of_dead_process_is_taken_over(path: Path, dead_pid: int, age_s: float, changes: dict[str, str]) -> None:
    write_claim(path, dead_pid, age_s, **changes)
    assert find_holder(path) is None
    with hold_lock(path, "this test") as held:
        held.check()
        assert json.loads(path.read_text())["what"] == "this test"
        assert "this test by process" in refuse(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


def test_lock_of_live_process_is_not_taken_over(path: Path) -> None:
    write_claim(path, os.getpid(), age_s=1000.0)
    before = path.read_bytes()
    with pytest.raises(LockError, match="process is alive"), hold_lock(path, "this test"):
        pytest.fail("two processes hold it")
    assert path.read_bytes() == before


def test_process_hidden_by_the_system_counts_as_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, another user's process has no visible /proc/PID, and signals to it are not permitted."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_claim(path, os.getpid(), age_s=4000.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
        patch.setattr(psutil, "Process", lambda pid: (_ for _ in ()).throw(psutil.NoSuchProcess(pid)))
        assert read_start(os.getpid()) == ""
    monkeypatch.setattr(lock, "read_start", lambda pid: "")
    assert "process is alive" in refuse(path)


def test_reused_pid_is_not_taken_for_the_holder(path: Path) -> None:
    """In a restarted container, for example, the first process always has PID 1."""
    write_claim(path, os.getpid(), started="another time")
    with hold_lock(path, "this test"):
        assert "this test by process" in refuse(path)


def test_process_that_died_before_describing_itself_holds_nothing(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    os.utime(path, (0, 0))
    assert find_holder(path) is None
    with hold_lock(path, "this test"):
        assert "this test by process" in refuse(path)


def test_live_holder_keeps_lock_after_file_server_outage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first check finds two minutes of silence, the next one a sign of life."""
    write_claim(path, 1, age_s=200.0, host="elsewhere")
    now_s = [100.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if now_s[0] > 105.0:
            os.utime(path)

    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(LockError, match="seems to be alive"), hold_lock(path, "this test"):
        pytest.fail("two processes hold it")


@pytest.mark.parametrize("alive", [True, False])
def test_silent_holder_on_another_machine_is_watched(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alive: bool
) -> None:
    write_claim(path, 1, age_s=60.0, host="elsewhere")
    now_s = [100.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if alive and now_s[0] > 110.0:
            os.utime(path)

    monkeypatch.setattr(lock.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(lock, "_measure_silence_s", lambda claim: now_s[0] - 40.0)
    if alive:
        with pytest.raises(LockError, match="on elsewhere since.*seems to be alive"), hold_lock(path, "this test"):  # noqa: RUF043
            pytest.fail("two processes hold it")
    else:
        with hold_lock(path, "this test"):
            assert now_s[0] > 160.0
    assert capsys.readouterr().err.count("waiting for a sign of life") == 1


def test_holder_renews_its_file_until_another_process_takes_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_RENEW_S", 0.01)
    reads: list[bytes] = []
    parse = parse_holder

    def record(text: bytes) -> Holder | None:
        reads.append(text)
        return parse(text)

    monkeypatch.setattr(lock, "parse_holder", record)
    with hold_lock(path, WHAT):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:  # pytest's timeout bounds it
            time.sleep(0.01)
        write_claim(path.with_name("other claim"), 1, host="elsewhere")
        os.utime(path.with_name("other claim"), (0, 0))
        path.with_name("other claim").replace(path)
        before = len(reads)
        while len(reads) < before + 3:
            time.sleep(0.01)
        assert path.stat().st_mtime == 0
    assert path.exists(), "only the other process may remove it"


def test_holder_renews_its_file_where_times_cannot_be_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_S", 0.01)
    set_time = os.utime

    def forbid(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(lock.os, "utime", forbid)
    with hold_lock(path, WHAT) as held:
        before = path.read_bytes()
        set_time(path, (0, 0))
        while path.stat().st_mtime == 0:  # pytest's timeout bounds it
            time.sleep(0.01)
        held.check()
        assert path.read_bytes() == before


@pytest.mark.parametrize("removed", [False, True])
def test_process_suspended_for_long_notices_the_loss_of_its_lock(path: Path, removed: bool) -> None:
    with hold_lock(path, WHAT) as held:
        held.check()
        if removed:
            path.unlink()
        else:
            write_claim(path.with_name("other claim"), os.getpid(), host="elsewhere")
            path.with_name("other claim").replace(path)
        with pytest.raises(LockError, match="was removed" if removed else "on elsewhere since"):
            held.check()


def test_failing_file_server_does_not_count_as_loss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with hold_lock(path, WHAT) as held, monkeypatch.context() as patch:
        patch.setattr(lock, "_read_claim", read)
        held.check()
        with pytest.raises(LockError, match="can't be read: Input/output error"):
            find_holder(path)


def test_file_replaced_while_it_is_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client reports `Stale file handle` then."""
    write_claim(path, os.getpid())
    parse, failed = parse_holder, []

    def fail_first(text: bytes) -> Holder | None:
        if not failed:
            failed.append(path.unlink())
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return parse(text)

    monkeypatch.setattr(lock, "parse_holder", fail_first)
    with hold_lock(path, "this test") as held:
        held.check()


# --- concurrent attempts ---------------------------------------------------------------------------------------------


def count_holders(path: Path, tries: int = 8) -> tuple[int, int]:
    """Return how many threads get the lock and how many do not, if none releases it before all have tried."""
    held, refused = [], []
    all_tried = threading.Barrier(tries)

    def attempt() -> None:
        try:
            with hold_lock(path, WHAT):
                held.append(1)
                all_tried.wait(60)
        except LockError:
            refused.append(1)
            all_tried.wait(60)

    threads = [threading.Thread(target=attempt) for _ in range(tries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return len(held), len(refused)


def test_one_of_many_concurrent_attempts_succeeds(path: Path) -> None:
    assert count_holders(path) == (1, 7)


def test_one_of_many_concurrent_takeovers_succeeds(path: Path, dead_pid: int) -> None:
    write_claim(path, dead_pid)
    assert count_holders(path) == (1, 7)


def interleave(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Run another process's `action` before this process first calls a function of the module."""
    function, called = getattr(lock, name), []

    def act_first(*arguments: object) -> object:
        if not called:
            called.append(1)
            action()
        return function(*arguments)

    monkeypatch.setattr(lock, name, act_first)


def test_takeover_from_outdated_chain_takes_the_lock_from_nobody(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes over the dead holder's lock after this one read the chain, and still holds it."""
    write_claim(path, dead_pid)
    with ExitStack() as stack:
        interleave(monkeypatch, "_take_over", lambda: stack.enter_context(hold_lock(path, "other holder")))
        assert "other holder by process" in refuse(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


def test_failed_takeover_does_not_block_the_next(path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_claim(path, dead_pid)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with pytest.raises(LockError, match="can't be taken: Input/output error"), hold_lock(path, WHAT):
            pytest.fail("got the lock")
    with hold_lock(path, "this test") as held:
        held.check()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.ETXTBSY, errno.EPERM], ids=errno.errorcode.get)
def test_lock_of_dead_process_is_taken_over_where_open_files_cannot_be_replaced(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def move(*_: object) -> None:
        assert path.exists(), "while it is missing, another process would create it"
        raise OSError(number, os.strerror(number))

    write_claim(path, dead_pid)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with hold_lock(path, WHAT) as held:
            held.check()
            assert refuse(path).startswith(f"{WHAT} by process {os.getpid()} ")
            assert len(list(path.parent.iterdir())) == 2, "the claim stays beside the file"
        assert list(path.parent.iterdir()) == []
        token = write_claim(path, dead_pid)
        write_claim(path.with_name(f"{path.name}.{token}.next"), dead_pid)
        with hold_lock(path, WHAT) as held:
            held.check()
            assert refuse(path).startswith(f"{WHAT} by process {os.getpid()} ")
    assert list(path.parent.iterdir()) == []


def test_holder_renews_its_claim_where_it_cannot_replace_the_file(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    token = write_claim(path, dead_pid)
    monkeypatch.setattr(Path, "replace", move)
    monkeypatch.setattr(lock, "_RENEW_S", 0.01)
    with hold_lock(path, WHAT):
        claim = path.with_name(f"{path.name}.{token}.next")
        os.utime(claim, (0, 0))
        os.utime(path, (0, 0))
        while claim.stat().st_mtime == 0:  # pytest's timeout bounds it
            time.sleep(0.01)
        assert path.stat().st_mtime == 0


@pytest.mark.parametrize("replaceable", [True, False])
def test_process_suspended_during_takeover_takes_the_lock_from_nobody(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch, replaceable: bool
) -> None:
    """Just before it moves its claim into place, another process takes the lock as if from a dead holder."""

    def move(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write_claim(path, dead_pid)
    if not replaceable:
        monkeypatch.setattr(Path, "replace", move)
    other = describe_self("other holder")
    interleave(monkeypatch, "_move", lambda: lock._take_over(path, lock._read_chain(path), other))
    assert not lock._take_over(path, lock._read_chain(path), describe_self("this test"))
    assert "other holder by process" in refuse(path)
    lock._release(path, other)
    assert list(path.parent.iterdir()) == []


def in_use(monkeypatch: pytest.MonkeyPatch, name: str, tries: int | None = None) -> list[float]:
    """Refuse to remove files of that ending, for the first `tries` times or always; return the waits."""
    unlink, waits_s, refused = Path.unlink, list[float](), list[Path]()

    def act(file: Path, missing_ok: bool = False) -> None:
        if file.name.endswith(name) and file.exists() and (tries is None or len(refused) < tries):
            refused.append(file)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(file, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", act)
    monkeypatch.setattr(lock.time, "monotonic", lambda: sum(waits_s))
    monkeypatch.setattr(lock.time, "sleep", waits_s.append)
    return waits_s


def test_file_that_is_open_for_a_moment_is_removed_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s = in_use(monkeypatch, ".lock", tries=3)
    with hold_lock(path, WHAT):
        pass
    assert list(path.parent.iterdir()) == [] and len(waits_s) == 3


def test_lock_that_cannot_be_removed_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s = in_use(monkeypatch, ".lock")
    for number in range(3):
        with hold_lock(path, f"holder {number}") as held:
            held.check()
            assert refuse(path).startswith(f"holder {number} by process")
        assert find_holder(path) is None
    assert 6.0 <= sum(waits_s) < 7.0


def test_lock_is_taken_over_where_the_files_of_dead_processes_cannot_be_removed(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = write_claim(path, dead_pid)
    write_claim(path.with_name(f"{path.name}.{token}.next"), dead_pid)
    in_use(monkeypatch, ".next")
    for _ in range(2):
        with hold_lock(path, "this test") as held:
            held.check()
            assert refuse(path).startswith("this test by process")


def test_failed_takeover_whose_claim_cannot_be_removed_does_not_block_the_next(
    path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_claim(path, dead_pid)
    with monkeypatch.context() as patch:
        in_use(patch, ".next")
        patch.setattr(Path, "replace", move)
        with pytest.raises(LockError, match="can't be taken: Input/output error"), hold_lock(path, WHAT):
            pytest.fail("got the lock")
    with hold_lock(path, "this test") as held:
        held.check()
    assert list(path.parent.iterdir()) == []


def test_process_suspended_during_release_removes_no_other_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it has read its own file, another process takes the lock as if from a dead holder."""
    context = hold_lock(path, WHAT)
    context.__enter__()
    chain = lock._read_chain(path)
    other = describe_self("other holder")
    interleave(monkeypatch, "_create", lambda: lock._take_over(path, chain, other))
    context.__exit__(None, None, None)
    assert str(find_holder(path)).startswith("other holder by process")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_unfinished_takeover_of_dead_process_is_taken_over(path: Path, dead_pid: int) -> None:
    for alive in (True, False):
        token = write_claim(path, dead_pid)
        successor = path.with_name(f"{path.name}.{token}.next")
        write_claim(successor, os.getpid() if alive else dead_pid)
        if alive:
            assert "process is alive" in refuse(path)
            successor.unlink()
    with hold_lock(path, "this test") as held:
        held.check()
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_holder_does_not_remove_the_file_during_a_takeover(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was suspended for long, and resumes while another process takes its lock."""
    context = hold_lock(path, WHAT)
    held = context.__enter__()
    token = json.loads(path.read_text())["token"]
    write_claim(path.with_name(f"{path.name}.{token}.next"), os.getpid(), what="other holder")
    with pytest.raises(LockError, match="other holder by process"):
        held.check()
    context.__exit__(None, None, None)
    assert str(find_holder(path)).startswith("other holder by process")


# --- find_holder -----------------------------------------------------------------------------------------------------


def test_find_holder_finds_another_process_without_disturbing_it(path: Path) -> None:
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
        assert path.read_text() != "", "the claim remains"
        assert find_holder(path) is None
    with hold_lock(path, "next holder"):
        pass


def test_holder_names_its_launch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in ("", "4711"):
        monkeypatch.setenv(LAUNCHED, launch)
        with hold_lock(path, WHAT):
            holder = find_holder(path)
            assert holder is not None and holder.launch == launch


def test_find_holder_works_in_a_read_only_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write_claim(path, 1, host="elsewhere")
    monkeypatch.setattr(Path, "touch", touch)
    holder = find_holder(path)
    assert holder is not None and holder.host == "elsewhere"

"""The rendezvous at an address: half a group says for whom it waits, and goes on as soon as the other half arrives."""

import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from rank_launcher import find_free_port
from torch.distributed import TCPStore

from doccls.training.meeting import MeetingError, MeetingPoint, meet

LIMIT = timedelta(seconds=60)


@dataclass
class _Rank:
    """A rank that arrives in a thread; its store lives as long as it."""

    point: MeetingPoint
    results: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._meet, daemon=True)
        self._thread.start()

    def _meet(self) -> None:
        try:
            self.results.append(meet(self.point, LIMIT, print))
        except MeetingError as error:
            self.results.append(str(error))

    def join(self) -> Any:
        """Return its store, or the message of its error."""
        self._thread.join(60)
        return self.results[0]


@pytest.mark.parametrize(("rank", "missing"), [(0, "ranks 1, 2"), (1, "rank 0")])
def test_rank_says_for_whom_it_waits_and_goes_on_when_they_arrive(rank: int, missing: str) -> None:
    """The other ranks start when this one has said that it waits for them."""
    point = MeetingPoint(rank, 3, "127.0.0.1", find_free_port())
    others, messages = list[_Rank](), list[str]()

    def say(text: str) -> None:
        messages.append(text)
        others.extend(_Rank(replace(point, rank=other)) for other in range(3) if other != rank)

    store = meet(point, LIMIT, say, patience_s=0.2)
    store.set("group", "formed")
    assert [other.join().get("group") for other in others] == [b"formed"] * 2
    (message,) = messages
    assert message.startswith(f"[WARNING] rank {rank} of 3 (process ")
    assert f" waits for {missing} at 127.0.0.1:{point.port} (MASTER_ADDR, MASTER_PORT): 0 s so far, at most 60 s. " in (
        message
    )


def test_only_the_missing_rank_is_named() -> None:
    """The store is that of torchrun's agent, in which rank 2 has already arrived."""
    point = MeetingPoint(0, 3, "127.0.0.1", find_free_port(), has_agent=True)
    agent = TCPStore(point.host, point.port, is_master=True, wait_for_workers=False)
    agent.set("doccls/0/rank2", "")
    with pytest.raises(MeetingError, match=r"waits for rank 1 at .*: given up after 1 s\."):
        meet(point, timedelta(seconds=1), print)


def test_missing_rank_0_is_reported_after_the_timeout() -> None:
    point = MeetingPoint(1, 2, "127.0.0.1", find_free_port())
    with pytest.raises(MeetingError, match=r"rank 1 of 2 .* waits for rank 0 at .*: given up, "):
        meet(point, timedelta(seconds=1), print)


def test_together_no_rank_says_anything() -> None:
    point, messages = MeetingPoint(0, 2, "127.0.0.1", find_free_port()), list[str]()
    other = _Rank(replace(point, rank=1))
    store = meet(point, LIMIT, messages.append)
    store.set("group", "formed")
    assert other.join().get("group") == b"formed" and messages == []


def test_end_of_rank_0_is_reported() -> None:
    point = MeetingPoint(1, 3, "127.0.0.1", find_free_port())
    host = TCPStore(point.host, point.port, is_master=True, wait_for_workers=False)
    rank = _Rank(point)
    host.wait(["doccls/0/rank1"], LIMIT)
    del host
    message = rank.join()
    assert " waits for ranks 0, 2 at " in message and "given up, since rank 0 has ended" in message


def test_address_of_another_machine_is_named_by_rank_0() -> None:
    """Rank 0 listens on its own machine, and nobody answers at the stated one (RFC 5737 reserves the address)."""
    with pytest.raises(MeetingError, match=r"waits for itself at 192\.0\.2\.1:.*: given up, .*[^.]\. Was each process"):
        meet(MeetingPoint(0, 2, "192.0.2.1", find_free_port()), timedelta(seconds=1), print)

"""Devices -> slots: places in which one fold at a time is trained, and which fold starts in which; pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from doccls.errors import UserError
from launcher.devices import Device


@dataclass(frozen=True)
class Slot:
    """Where one fold at a time is trained."""

    number: int
    devices: tuple[Device, ...]
    """One for each rank of the fold."""

    @property
    def name(self) -> str:
        """Such as `gpu 0,1` or `cpu 3`."""
        kind, _, _ = self.devices[0].name.rpartition(" ")
        return f"{kind} {','.join(device.name.removeprefix(f'{kind} ') for device in self.devices)}".strip()


def make_slots(devices: Sequence[Device], ranks_per_fold: int, folds_per_device: int = 1) -> tuple[Slot, ...]:
    """Neighbouring devices make a group of `ranks_per_fold`; each group is `folds_per_device` slots.

    The first slots are one of each group.

    Raises:
        UserError: there are fewer devices than one fold needs.
    """
    assert ranks_per_fold >= 1 and folds_per_device >= 1
    count = len(devices) // ranks_per_fold
    if count == 0:
        there = ", ".join(device.name for device in devices) or "none"
        raise UserError(f"one fold takes {ranks_per_fold} devices, and there are {len(devices)}: {there}")
    groups = [tuple(devices[group * ranks_per_fold : (group + 1) * ranks_per_fold]) for group in range(count)]
    return tuple(Slot(number, group) for number, group in enumerate(groups * folds_per_device))


def list_starts(waiting: Sequence[int], busy: Sequence[Slot], slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
    """The folds to start now: those that wait, in order, each in a free slot on the devices that the fewest share.

    Whoever starts them whenever a fold has ended needs at most the time of list scheduling: total work by the number of
    slots, and one more fold (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    """
    taken = list(busy)
    starts: list[tuple[int, Slot]] = []
    for fold in waiting:
        numbers = {slot.number for slot in taken}
        sharing = Counter(slot.devices for slot in taken)
        free = [slot for slot in slots if slot.number not in numbers]
        if not free:
            break
        slot = min(free, key=lambda slot: (sharing[slot.devices], slot.number))
        starts.append((fold, slot))
        taken.append(slot)
    return starts

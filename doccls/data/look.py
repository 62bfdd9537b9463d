"""The look at the image files before training: each is read and decoded once, and its page kept in a store, if any.

What is known of a file, by its size and time of change, is not read again: not by the next run, nor by another process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from doccls.data.inspection import ImageFact, ImageLook, Inspected, digest_wholes, inspect_images
from doccls.data.known import is_unchanged, read_known, write_known
from doccls.data.store import PageStore, Place, StoreChoice, StoredPages, StoreError, locate_pages
from doccls.run.artifacts import WriteError
from doccls.run.lock import LockError, hold_lock
from doccls.run.progress import Teller

_FILLING_S = 24 * 3600.0
"""How long another one's decoding may take."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What is known of the files after the look."""

    looks: dict[Path, ImageLook]
    index: Mapping[str, Place] | None = None
    """Of the store: digest of a file -> its page; None if there is no store."""


@dataclass(frozen=True, eq=False)
class ScannedRows:
    """The rows of a table, each judged by the scan of its image."""

    usable: tuple[ImageFact | None, ...]
    """What was found in each row's image; None where it is missing or can't be used."""
    bad: Mapping[int, str]
    """Row -> why its image can't be used."""
    looks: Mapping[Path, ImageLook]
    """What was found in each file."""
    stored: StoredPages | None
    """The rows' decoded pages, where there is a store."""

    @property
    def skipped(self) -> frozenset[int]:
        """Rows without a usable image."""
        return frozenset(row for row, fact in enumerate(self.usable) if fact is None)


def scan_rows(
    paths: Sequence[Path | None],
    known: Mapping[Path, ImageLook],
    size_px: int,
    max_pixels: int,
    choice: StoreChoice | None,
    teller: Teller,
) -> ScannedRows:
    """Scan each row's image (None where there is none) and judge it; with a store, find the rows' pages there.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    files = sorted({path for path in paths if path is not None})
    looked = look_at_images(files, known, size_px, max_pixels, choice, teller)
    facts = [None if path is None else looked.looks[path].fact for path in paths]
    usable = tuple(fact if fact is not None and fact.problem is None else None for fact in facts)
    bad = {row: fact.problem for row, fact in enumerate(facts) if fact is not None and fact.problem is not None}
    digests = [None if fact is None else fact.digest for fact in usable]
    stored = None if looked.index is None else locate_pages(looked.index, digests)
    return ScannedRows(usable, bad, looked.looks, stored)


def look_at_images(
    files: Sequence[Path],
    known: Mapping[Path, ImageLook],
    size_px: int,
    max_pixels: int,
    choice: StoreChoice | None,
    teller: Teller,
) -> Looked:
    """Each of `files`; with a store, each usable page is in it then, at `size_px`.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    looked = None
    if choice is not None:
        try:
            looked = _fill(PageStore(choice.folder, size_px), files, known, max_pixels, teller)
        except (StoreError, WriteError, LockError) as error:
            if choice.needed:
                raise
            teller.line(f"[WARNING] {error}: pages are decoded in each epoch (data.store)")
    if looked is None:
        looks = _keep_unchanged(files, known)
        lacking = [path for path in files if path not in looks]
        looks |= {path: one.look for path, one in _inspect(lacking, size_px, max_pixels, {}, False, teller)}
        looked = Looked(_compare_whole(looks, max_pixels))
    return looked


def _fill(
    store: PageStore, files: Sequence[Path], known: Mapping[Path, ImageLook], max_pixels: int, teller: Teller
) -> Looked:
    """By one of several processes that come at once; what was decoded before a kill is kept."""
    kept = read_known(store.looks, max_pixels)
    looks = _keep_unchanged(files, {**kept, **known})
    index, decoded = store.read_index(), 0
    if _list_lacking(files, looks, index):
        with hold_lock(store.lock, "pages are being decoded", wait_s=_FILLING_S):
            index = store.read_index()  # another may have been here first
            lacking = _list_lacking(files, looks, index)
            store.check_room(len(lacking))
            facts = {one: place.fact for one, place in index.items() if _count_pixels(place.fact) <= max_pixels}
            inspected = _inspect(lacking, store.size_px, max_pixels, facts, True, teller)
            while some := list(islice(inspected, store.segment_pages)):
                looks |= {path: one.look for path, one in some}
                pages = {one.fact.digest: one for _, one in some if one.scaled is not None}
                if pages:
                    index |= store.add(list(pages.values()))
                    decoded += len(pages)
    looks = _compare_whole(looks, max_pixels)
    with suppress(OSError):  # it saves time and decides nothing
        if (now := {**kept, **looks}) != kept:
            write_known(store.looks, now, max_pixels)
    teller.line(f"[DATA] decoded pages: {store.folder} holds {len(index)}, of which {decoded} were decoded now")
    return Looked(looks, index)


def _keep_unchanged(files: Sequence[Path], known: Mapping[Path, ImageLook]) -> dict[Path, ImageLook]:
    return {path: known[path] for path in files if path in known and is_unchanged(path, known[path])}


def _list_lacking(files: Sequence[Path], looks: Mapping[Path, ImageLook], index: Mapping[str, Place]) -> list[Path]:
    """Files that are not known, or whose page is not in the store."""

    def lacks(path: Path) -> bool:
        fact = looks[path].fact if path in looks else None
        return fact is None or (fact.problem is None and fact.digest not in index)

    return [path for path in files if lacks(path)]


def _inspect(
    files: Sequence[Path],
    size_px: int,
    max_pixels: int,
    facts: Mapping[str, ImageFact],
    keep_pages: bool,
    teller: Teller,
) -> Iterator[tuple[Path, Inspected]]:
    """Each file and the look into it, with a bar."""
    if not files:
        return
    what = "images to read and decode"
    teller.line(f"[DATA] {len(files)} {what}")
    with teller.progress(what, len(files)) as bar:
        for path, one in zip(files, inspect_images(files, max_pixels, size_px, facts, keep_pages), strict=True):
            bar.advance()
            yield path, one


def _compare_whole(looks: dict[Path, ImageLook], max_pixels: int) -> dict[Path, ImageLook]:
    """A JPEG is known by its page at a part of its size. Where a file of another kind has as many pixels, and so may
    show the same page, it is to be known by its whole page too."""
    facts = [look.fact for look in looks.values()]
    whole = {(fact.height_px, fact.width_px) for fact in facts if fact.content and fact.reduced == 1}
    mixed = [
        path
        for path, look in looks.items()
        if look.fact.reduced > 1 and (look.fact.height_px, look.fact.width_px) in whole
    ]
    contents = zip(mixed, digest_wholes(mixed, max_pixels), strict=True)
    return looks | {
        path: replace(looks[path], fact=replace(looks[path].fact, content=content, reduced=1))
        for path, content in contents
        if content is not None
    }


def _count_pixels(fact: ImageFact) -> int:
    return fact.height_px * fact.width_px

"""The scan of the image files before training: each is read and decoded once, and its page kept in a store, if any.

A file whose size and time of change are in the scan cache is not read again, by the next run or by another process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from doccls.config import Config
from doccls.data.image_scan import ImageFact, ImageScan, ScannedImage, digest_whole_pages, scan_files
from doccls.data.scan_cache import is_unchanged, read_scan_cache, write_scan_cache
from doccls.data.store import PageStore, Place, StoreChoice, StoredPages, StoreError, locate_pages
from doccls.reporting.progress import Reporter
from doccls.system.atomic_files import WriteError
from doccls.system.lock import LockError, hold_lock

_FILLING_S = 24 * 3600.0
"""How long another process may decode."""


@dataclass(frozen=True, eq=False)
class ScannedFiles:
    """What is known about the files after the scan."""

    scans: dict[Path, ImageScan]
    index: Mapping[str, Place] | None = None
    """Of the store: digest of a file -> its page; None if there is no store."""
    in_store: bool = False
    """The store holds all of `scans`, for the next process."""


@dataclass(frozen=True, eq=False)
class ScannedRows:
    """The rows of a table, each judged by the scan of its image."""

    usable: tuple[ImageFact | None, ...]
    """What was found in each row's image; None where it is missing or can't be used."""
    bad: Mapping[int, str]
    """Row -> why its image can't be used."""
    files: ScannedFiles
    stored: StoredPages | None
    """The rows' decoded pages, where there is a store."""

    @property
    def skipped(self) -> frozenset[int]:
        """Rows without a usable image."""
        return frozenset(row for row, fact in enumerate(self.usable) if fact is None)


def scan_rows(
    paths: Sequence[Path | None],
    config: Config,
    cache: Mapping[Path, ImageScan],
    choice: StoreChoice | None,
    reporter: Reporter,
) -> ScannedRows:
    """Scan each row's image (None where there is none) and judge it; with a store, find the rows' pages there.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    files = sorted({path for path in paths if path is not None})
    scanned = scan_images(files, cache, config.page_px, config.data.max_image_pixels, choice, reporter)
    facts = [None if path is None else scanned.scans[path].fact for path in paths]
    usable = tuple(fact if fact is not None and fact.problem is None else None for fact in facts)
    bad = {row: fact.problem for row, fact in enumerate(facts) if fact is not None and fact.problem is not None}
    digests = [None if fact is None else fact.digest for fact in usable]
    stored = None if scanned.index is None else locate_pages(scanned.index, digests)
    return ScannedRows(usable, bad, scanned, stored)


def scan_images(
    files: Sequence[Path],
    cache: Mapping[Path, ImageScan],
    size_px: int,
    max_pixels: int,
    choice: StoreChoice | None,
    reporter: Reporter,
) -> ScannedFiles:
    """Scan each of `files` that is not in the `cache` and unchanged; with a store, put each usable page there.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    if choice is not None:
        try:
            return _scan_with_store(PageStore(choice.folder, size_px), files, cache, max_pixels, reporter)
        except (StoreError, WriteError, LockError) as error:
            if choice.needed:
                raise
            reporter.line(f"[WARNING] {error}: pages are decoded in each epoch (data.store)")
    scans = _keep_unchanged(files, cache)
    lacking = [path for path in files if path not in scans]
    scans |= {path: scanned.scan for path, scanned in _scan(lacking, size_px, max_pixels, {}, False, reporter)}
    return ScannedFiles(_compare_whole(scans, max_pixels))


def _scan_with_store(
    store: PageStore, files: Sequence[Path], cache: Mapping[Path, ImageScan], max_pixels: int, reporter: Reporter
) -> ScannedFiles:
    """Of several processes that start at once, one decodes; what was decoded before a kill is kept."""
    file = store.scan_cache(max_pixels)
    index = store.read_index()
    stored = read_scan_cache(file, max_pixels, _list_facts(index))
    scans = _keep_unchanged(files, cache) | _keep_unchanged(files, stored)
    decoded = 0
    if _list_lacking(files, scans, index):
        with hold_lock(store.lock, "pages are being decoded", wait_s=_FILLING_S):
            index = store.read_index()  # another process may have filled it meanwhile
            stored = read_scan_cache(file, max_pixels, _list_facts(index))
            scans |= _keep_unchanged(files, stored)
            decoded = _fill(store, _list_lacking(files, scans, index), scans, index, max_pixels, reporter)
            scans = _compare_whole(scans, max_pixels)
            with suppress(OSError):  # it saves time and decides nothing
                write_scan_cache(file, stored | scans, max_pixels, _list_facts(index))
                stored |= scans
    scans = _compare_whole(scans, max_pixels)
    reporter.line(f"[DATA] decoded pages: {store.folder} holds {len(index)}, of which {decoded} were decoded now")
    return ScannedFiles(scans, index, scans.items() <= stored.items())


def _fill(
    store: PageStore,
    files: Sequence[Path],
    scans: dict[Path, ImageScan],
    index: dict[str, Place],
    max_pixels: int,
    reporter: Reporter,
) -> int:
    """Scan the files and put their pages into the store; both are added to `scans` and `index`. Pages decoded."""
    store.check_free_space(len(files))
    decoded = 0
    facts = {
        digest: fact for digest, fact in _list_facts(index).items() if fact.height_px * fact.width_px <= max_pixels
    }
    found = _scan(files, store.size_px, max_pixels, facts, True, reporter)
    while some := list(islice(found, store.segment_pages)):
        scans |= {path: scanned.scan for path, scanned in some}
        pages = {scanned.fact.digest: scanned for _, scanned in some if scanned.scaled is not None}
        if pages:
            index |= store.add(list(pages.values()))
            decoded += len(pages)
    return decoded


def _list_facts(index: Mapping[str, Place]) -> dict[str, ImageFact]:
    """What the store's segments say about files, by digest."""
    return {digest: place.fact for digest, place in index.items()}


def _keep_unchanged(files: Sequence[Path], cache: Mapping[Path, ImageScan]) -> dict[Path, ImageScan]:
    return {path: cache[path] for path in files if path in cache and is_unchanged(path, cache[path])}


def _list_lacking(files: Sequence[Path], scans: Mapping[Path, ImageScan], index: Mapping[str, Place]) -> list[Path]:
    """Files that are not scanned, or whose page is not in the store."""

    def lacks(path: Path) -> bool:
        fact = scans[path].fact if path in scans else None
        return fact is None or (fact.problem is None and fact.digest not in index)

    return [path for path in files if lacks(path)]


def _scan(
    files: Sequence[Path],
    size_px: int,
    max_pixels: int,
    facts: Mapping[str, ImageFact],
    keep_pages: bool,
    reporter: Reporter,
) -> Iterator[tuple[Path, ScannedImage]]:
    """Each file and its scan, with a bar."""
    if not files:
        return
    what = "images to read and decode"
    reporter.line(f"[DATA] {len(files)} {what}")
    with reporter.progress(what, len(files)) as bar:
        for path, scanned in zip(files, scan_files(files, max_pixels, size_px, facts, keep_pages), strict=True):
            bar.advance()
            yield path, scanned


def _compare_whole(scans: dict[Path, ImageScan], max_pixels: int) -> dict[Path, ImageScan]:
    """A JPEG is known by its page at a part of its size. Where a file of another kind has as many pixels, and so may
    show the same page, it is to be known by its whole page too."""
    facts = [scan.fact for scan in scans.values()]
    whole = {(fact.height_px, fact.width_px) for fact in facts if fact.content and fact.reduced == 1}
    mixed = [
        path
        for path, scan in scans.items()
        if scan.fact.reduced > 1 and (scan.fact.height_px, scan.fact.width_px) in whole
    ]
    contents = zip(mixed, digest_whole_pages(mixed, max_pixels), strict=True)
    return scans | {
        path: replace(scans[path], fact=replace(scans[path].fact, content=content, reduced=1))
        for path, content in contents
        if content is not None
    }

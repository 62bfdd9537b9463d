"""The scan of all image files before training: each is decoded once and its page kept in the store, if there is one.

A file whose size and mtime match the scan cache is not read again, neither by the next run nor by another process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from doccls.config import Config
from doccls.config.paths import find_output_problem
from doccls.data.image_scan import ImageFact, ImageScan, ScannedImage, digest_full_pages, scan_files
from doccls.data.packed import PackedPaths
from doccls.data.scan_cache import is_unchanged, read_scan_cache, write_scan_cache
from doccls.data.store import PageLocation, PageStore, StoreChoice, StoredPages, StoreError, locate_pages
from doccls.reporting.progress import Reporter
from doccls.system.atomic_files import WriteError
from doccls.system.lock import LockError, hold_lock

_MAX_FILL_S = 24 * 3600.0  # how long to wait for another process that fills the store


@dataclass(frozen=True, eq=False)
class ScannedFiles:
    """The scans of all files and, with a store, its index."""

    scans: dict[Path, ImageScan]
    index: Mapping[str, PageLocation] | None = None  # the store's index, by file digest; None without a store
    in_store: bool = False  # whether the store holds all of `scans` for the next process


@dataclass(frozen=True, eq=False)
class ScannedRows:
    """The rows of a table, split into usable and bad ones by the scan of their images."""

    usable: tuple[ImageFact | None, ...]  # each row's image; None where it is missing or can't be used
    bad: Mapping[int, str]  # row -> why its image can't be used
    files: ScannedFiles
    stored: StoredPages | None  # the rows' decoded pages, if there is a store

    @property
    def skipped(self) -> frozenset[int]:
        """The rows without a usable image."""
        return frozenset(row for row, fact in enumerate(self.usable) if fact is None)


def scan_rows(
    paths: PackedPaths,
    config: Config,
    cache: Mapping[Path, ImageScan],
    choice: StoreChoice | None,
    reporter: Reporter,
) -> ScannedRows:
    """Scan each row's image, split the rows into usable and bad, and locate their pages in the store.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    names = list(paths.names)
    path_of = {name: paths.locate(name) for name in set(names) if name}
    files = sorted(path_of.values())
    scanned = scan_images(files, cache, config.page_px, config.data.max_image_pixels, choice, reporter)
    fact_of = {name: scanned.scans[path].fact for name, path in path_of.items()}
    facts = [fact_of.get(name) for name in names]
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
    """Scan each file that is new or changed since it was cached; with a store, add each usable page to it.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
    """
    if choice is not None:
        problem = find_output_problem(choice.folder)
        try:
            if problem is not None:
                raise StoreError(problem)
            return _scan_with_store(PageStore(choice.folder, size_px), files, cache, max_pixels, reporter)
        except (StoreError, WriteError, LockError) as error:
            if choice.required:
                raise
            reporter.line(f"[WARNING] {error}: pages are decoded in each epoch (data.store)")
    scans = _keep_unchanged(files, cache)
    missing = [path for path in files if path not in scans]
    scans |= {path: scanned.scan for path, scanned in _scan(missing, size_px, max_pixels, {}, False, reporter)}
    return ScannedFiles(_unify_contents(scans, max_pixels))


def _scan_with_store(
    store: PageStore, files: Sequence[Path], cache: Mapping[Path, ImageScan], max_pixels: int, reporter: Reporter
) -> ScannedFiles:
    """Scan and fill the store. Of several processes that start at once, one decodes; a kill keeps what was decoded."""
    file = store.scan_cache(max_pixels)
    index = store.read_index()
    stored = read_scan_cache(file, max_pixels, _list_facts(index))
    scans = _keep_unchanged(files, cache) | _keep_unchanged(files, stored)
    decoded = 0
    if _list_missing(files, scans, index):
        with hold_lock(store.lock, "pages are being decoded", wait_s=_MAX_FILL_S):
            index = store.read_index()  # another process may have filled the store meanwhile
            stored = read_scan_cache(file, max_pixels, _list_facts(index))
            scans |= _keep_unchanged(files, stored)
            decoded = _fill(store, _list_missing(files, scans, index), scans, index, max_pixels, reporter)
            scans = _unify_contents(scans, max_pixels)
            with suppress(OSError):  # the scan cache only saves time
                write_scan_cache(file, stored | scans, max_pixels, _list_facts(index))
                stored |= scans
    scans = _unify_contents(scans, max_pixels)
    reporter.line(f"[DATA] decoded pages: {store.folder} holds {len(index)}, of which {decoded} were decoded now")
    return ScannedFiles(scans, index, scans.items() <= stored.items())


def _fill(
    store: PageStore,
    files: Sequence[Path],
    scans: dict[Path, ImageScan],
    index: dict[str, PageLocation],
    max_pixels: int,
    reporter: Reporter,
) -> int:
    """Scan the files and store their pages, updating `scans` and `index`; return the number of pages decoded."""
    store.check_free_space(len(files))
    decoded = 0
    facts = {
        digest: fact for digest, fact in _list_facts(index).items() if fact.height_px * fact.width_px <= max_pixels
    }
    remaining = _scan(files, store.size_px, max_pixels, facts, True, reporter)
    while segment := list(islice(remaining, store.segment_pages)):
        scans |= {path: scanned.scan for path, scanned in segment}
        pages = {scanned.fact.digest: scanned for _, scanned in segment if scanned.scaled is not None}
        if pages:
            index |= store.add(list(pages.values()))
            decoded += len(pages)
    return decoded


def _list_facts(index: Mapping[str, PageLocation]) -> dict[str, ImageFact]:
    """Return the facts that the store's segments hold about files, by digest."""
    return {digest: location.fact for digest, location in index.items()}


def _keep_unchanged(files: Sequence[Path], cache: Mapping[Path, ImageScan]) -> dict[Path, ImageScan]:
    return {path: cache[path] for path in files if path in cache and is_unchanged(path, cache[path])}


def _list_missing(
    files: Sequence[Path], scans: Mapping[Path, ImageScan], index: Mapping[str, PageLocation]
) -> list[Path]:
    """Return the files that are not scanned or whose page is not in the store."""

    def is_missing(path: Path) -> bool:
        fact = scans[path].fact if path in scans else None
        return fact is None or (fact.problem is None and fact.digest not in index)

    return [path for path in files if is_missing(path)]


def _scan(
    files: Sequence[Path],
    size_px: int,
    max_pixels: int,
    facts: Mapping[str, ImageFact],
    keep_pages: bool,
    reporter: Reporter,
) -> Iterator[tuple[Path, ScannedImage]]:
    """Yield each file with its scan, and show a progress bar."""
    if not files:
        return
    title = "images to read and decode"
    reporter.line(f"[DATA] {len(files)} {title}")
    with reporter.progress(title, len(files)) as bar:
        for path, scanned in zip(files, scan_files(files, max_pixels, size_px, facts, keep_pages), strict=True):
            bar.advance()
            yield path, scanned


def _unify_contents(scans: dict[Path, ImageScan], max_pixels: int) -> dict[Path, ImageScan]:
    """Make content digests comparable across file formats.

    A large JPEG's digest is of its reduced page. If a fully decoded file has the same size, and so may show the same
    page, the JPEG's digest is taken at full size too.
    """
    facts = [scan.fact for scan in scans.values()]
    full_sizes = {(fact.height_px, fact.width_px) for fact in facts if fact.content and fact.reduced == 1}
    mixed = [
        path
        for path, scan in scans.items()
        if scan.fact.reduced > 1 and (scan.fact.height_px, scan.fact.width_px) in full_sizes
    ]
    contents = zip(mixed, digest_full_pages(mixed, max_pixels), strict=True)
    return scans | {
        path: replace(scans[path], fact=replace(scans[path].fact, content=content, reduced=1))
        for path, content in contents
        if content is not None
    }

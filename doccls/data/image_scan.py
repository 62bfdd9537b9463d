"""The scan of single image files, in threads on all cores: usability, content digest and scaled page."""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doccls.config.paths import read_regular_file
from doccls.data.formats import ImageError, MissingExtraError
from doccls.data.images import count_pages, decode_image, decode_reduced
from doccls.system.cores import count_cores

_MAX_THREADS = 32
_AHEAD = 4  # files per thread that are scanned ahead, while the caller may be writing to disk


@dataclass(frozen=True)
class ImageFact:
    """The facts about an image file that depend on its bytes alone."""

    digest: str  # SHA-256 of the file's bytes; empty if it could not be read
    problem: str | None  # why the file can't be used; None if it can
    content: str = ""  # digest of the upright RGB page, independent of the file format; empty if there is no page
    pages: int = 1  # number of pages in the file, of which the first is used
    height_px: int = 0  # of the upright page at full size
    width_px: int = 0
    reduced: int = 1  # `content` is the digest of the page at 1/`reduced` of its size


@dataclass(frozen=True)
class ImageScan:
    """The scan of an image file: its size and mtime, which show whether it changed, and its facts."""

    size_bytes: int
    mtime_ns: int
    fact: ImageFact


@dataclass(frozen=True, eq=False)
class ScannedImage:
    """The scan of an image file and, if requested and usable, its page."""

    scan: ImageScan
    scaled: np.ndarray | None = None  # (height, width, 3) uint8

    @property
    def fact(self) -> ImageFact:
        """The facts of the scan."""
        return self.scan.fact


def scan_files(
    paths: Sequence[Path],
    max_pixels: int,
    size_px: int,
    facts: Mapping[str, ImageFact],
    keep_pages: bool,
) -> Iterator[ScannedImage]:
    """Read and decode every file once, in order, so that a bad one is found before training and not in epoch 3.

    A file whose digest is in `facts` is not decoded. With `keep_pages`, each scan has its page, scaled to `size_px`.
    """
    threads = _count_threads()
    ahead: deque[Future[ScannedImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for path in paths:
                ahead.append(pool.submit(_scan, path, max_pixels, size_px, facts, keep_pages))
                if len(ahead) > _AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def digest_full_pages(paths: Sequence[Path], max_pixels: int) -> list[str | None]:
    """Return the `content` digest of each file's page at full size; None where it can't be decoded."""

    def digest(path: Path) -> str | None:
        try:
            return _digest_page(decode_image(read_regular_file(path)[1], max_pixels))
        except (OSError, ImageError):
            return None

    with ThreadPoolExecutor(_count_threads()) as pool:
        return list(pool.map(digest, paths))


def _count_threads() -> int:
    return min(_MAX_THREADS, count_cores())


def _scan(path: Path, max_pixels: int, size_px: int, facts: Mapping[str, ImageFact], keep_pages: bool) -> ScannedImage:
    try:
        before, data = read_regular_file(path)
    except OSError as error:
        return ScannedImage(ImageScan(0, 0, ImageFact("", f"can't be read: {error.strerror or error}")))
    size, time = before.st_size, before.st_mtime_ns
    digest = hashlib.sha256(data).hexdigest()
    if digest in facts:
        return ScannedImage(ImageScan(size, time, facts[digest]))
    try:
        decoded = decode_reduced(data, max_pixels, size_px)
    except MissingExtraError as error:  # without a digest, the scan isn't cached
        return ScannedImage(ImageScan(size, time, ImageFact("", str(error))))
    except ImageError as error:
        return ScannedImage(ImageScan(size, time, ImageFact(digest, str(error))))
    content, pages = _digest_page(decoded.page), count_pages(data)
    fact = ImageFact(digest, None, content, pages, decoded.height_px, decoded.width_px, decoded.reduced)
    return ScannedImage(ImageScan(size, time, fact), decoded.scale(size_px) if keep_pages else None)


def _digest_page(page: np.ndarray) -> str:
    return hashlib.blake2b(page.data, digest_size=16, key=repr(page.shape).encode()).hexdigest()

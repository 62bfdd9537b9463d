"""The decoded-page store: it returns the decoder's pixels, decodes each page once and never serves damaged pages."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from doccls.data import image_scan
from doccls.data import store as store_module
from doccls.data.dataset import DocClsDataset, Pages, SampleKey
from doccls.data.image_scan import ImageFact, ImageScan, ScannedImage
from doccls.data.images import DecodedPage, scale_page
from doccls.data.prepare import PreparedData, prepare_data
from doccls.data.scan_cache import read_scan_cache, write_scan_cache
from doccls.data.store import PageLocation, PageStore, StoreChoice, StoredPages, StoreError, locate_pages
from doccls.errors import UserError
from tests.unit.conftest import MakeConfig, MakeData

SIZE = 32
SHAPES = [(40, 30), (30, 40), (32, 32), (200, 3), (3, 200), (1, 1), (7, 5)]
IDS = [f"i{number}" for number in range(12)]


def draw_page(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def make_scanned(digest: str, shape: tuple[int, int]) -> ScannedImage:
    scan = ImageScan(0, 0, ImageFact(digest, None, f"of {digest}", 1, *shape))
    return ScannedImage(scan, scale_page(draw_page(*shape), SIZE))


def fill(folder: Path) -> PageStore:
    store = PageStore(folder, SIZE)
    store.add([make_scanned(f"d{number}", shape) for number, shape in enumerate(SHAPES)])
    return store


def locate(store: PageStore) -> StoredPages:
    return locate_pages(store.read_index(), [f"d{number}" for number in range(len(SHAPES))])


# --- the store -------------------------------------------------------------------------------------------------------


def test_stored_page_equals_the_decoded_page(tmp_path: Path) -> None:
    stored = locate(fill(tmp_path))
    unpickled: StoredPages = pickle.loads(pickle.dumps(stored))  # noqa: S301 (as workers get it)
    for sample, shape in enumerate(SHAPES):
        expected = scale_page(draw_page(*shape), SIZE)
        for pages in (stored, unpickled):
            page = pages.read(sample)
            assert page is not None and np.array_equal(page, expected) and not page.flags.writeable
    assert unpickled._maps and not pickle.loads(pickle.dumps(unpickled))._maps  # noqa: S301


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.EACCES], ids=errno.errorcode.get)
def test_pages_are_read_where_files_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*others: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.mmap, "mmap", refuse)
    stored = locate(fill(tmp_path))
    for sample, shape in enumerate(SHAPES):
        page = stored.read(sample)
        assert page is not None and np.array_equal(page, scale_page(draw_page(*shape), SIZE))
        assert not page.flags.writeable
    stored.segments[0].unlink()
    assert stored.read(0) is None


def test_sample_without_stored_page_gives_none(tmp_path: Path) -> None:
    stored = locate_pages(fill(tmp_path).read_index(), [None, "d2", "unknown"])
    assert [stored.read(sample) is None for sample in range(3)] == [True, False, True]
    assert len(locate_pages({}, []).locations_N) == 0


def test_other_sizes_rules_and_decoder_versions_do_not_share_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fill(tmp_path).read_index()
    assert PageStore(tmp_path, SIZE + 1).read_index() == {}
    for module, name, value in (
        (store_module, "PIXEL_RULE", 99),
        (store_module.PIL, "__version__", "0"),
        (cv2, "__version__", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert PageStore(tmp_path, SIZE).read_index() == {}


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_segment_is_ignored(tmp_path: Path, fraction: float) -> None:
    store = fill(tmp_path)
    store.add([make_scanned("intact", (9, 9))])
    segment = store.read_index()["d0"].segment
    data = segment.read_bytes()
    segment.write_bytes(data[: int(fraction * len(data))])
    assert set(store.read_index()) == {"intact"}


@pytest.mark.parametrize(
    "content", [b"junk that is no segment", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x01\0\0\0\0\0\0\0["]
)
def test_foreign_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    store = fill(tmp_path)
    (store.folder / "pages_x.safetensors").write_bytes(content)
    assert len(store.read_index()) == len(SHAPES)


def test_flipped_header_bit_never_gives_a_wrong_page(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (segment,) = store.folder.glob("pages_*")
    data, index = segment.read_bytes(), store.read_index()
    for offset in range(8, min(location.offset for location in index.values())):
        segment.write_bytes(data[:offset] + bytes([data[offset] ^ 2]) + data[offset + 1 :])
        for sample in range(len(SHAPES)):
            page = locate(store).read(sample)
            assert page is None or np.array_equal(page, scale_page(draw_page(*SHAPES[sample]), SIZE))
        for digest, location in store.read_index().items():
            assert digest not in index or location.fact == index[digest].fact


def test_segment_size_is_bounded_by_memory(tmp_path: Path) -> None:
    assert [PageStore(tmp_path, size).segment_pages for size in (32, 224, 512, 4096)] == [256, 256, 85, 1]


def test_damaged_page_is_rejected_with_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path)
    location = store.read_index()["d0"]
    data = bytearray(location.segment.read_bytes())
    data[location.offset + 5] ^= 1
    location.segment.write_bytes(data)
    stored = locate(store)
    assert stored.read(0) is None and stored.read(1) is not None
    assert "a page is damaged and will be decoded again" in capfd.readouterr().err


def test_removed_segment_has_no_pages(tmp_path: Path) -> None:
    store = fill(tmp_path)
    stored = locate(store)
    for segment in stored.segments:
        segment.unlink()
    assert stored.read(0) is None


def test_full_disk_is_reported_before_anything_is_written(small_disk: Path) -> None:
    store = PageStore(small_disk, 100)
    store.folder.mkdir()
    store.check_free_space(40)
    with pytest.raises(
        StoreError, match=r"3\.0 MiB are free, less than twice the 2\.9 MiB that 100 pages of 100 px may take"
    ):
        store.check_free_space(100)


# --- filled by the scan ----------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record the contents of the files that are decoded."""
    files: list[bytes] = []
    real = image_scan.decode_reduced

    def decode(data: bytes, *others: Any) -> DecodedPage:
        files.append(data)
        return real(data, *others)

    monkeypatch.setattr(image_scan, "decode_reduced", decode)
    return files


@pytest.fixture
def prepare(make_config: MakeConfig, make_data: MakeData, tmp_path: Path) -> Callable[..., PreparedData]:
    """Return `prepare(cache, size)`, which prepares twelve pages with the store in tmp_path/store."""
    make_data(IDS, ["0", "1"] * 6)

    def act(cache: dict[Path, ImageScan] | None = None, size: int = SIZE) -> PreparedData:
        config = make_config(data={"folds": 2}, train={"img_size": size})
        return prepare_data(config, cache, StoreChoice(tmp_path / "store", required=True))

    return act


def read_all(data: PreparedData) -> list[np.ndarray]:
    assert data.stored is not None
    pages = [data.stored.read(sample) for sample in range(len(data.manifest))]
    assert all(page is not None for page in pages)
    return pages  # type: ignore[return-value]


def test_each_page_is_decoded_once(prepare: Callable[..., PreparedData], decoded: list[bytes], tmp_path: Path) -> None:
    first = prepare()
    assert len(decoded) == len(set(decoded)) == len(IDS)
    assert np.array_equal(read_all(first)[3], scale_page(np.asarray(Image.open(tmp_path / "train" / "i3.jpg")), SIZE))
    decoded.clear()
    second = prepare(dict(first.scans))
    assert decoded == [] and second.digest == first.digest
    assert all(np.array_equal(*pages) for pages in zip(read_all(first), read_all(second), strict=True))


def test_changed_file_and_other_size_are_decoded_again(
    prepare: Callable[..., PreparedData], decoded: list[bytes], tmp_path: Path
) -> None:
    cache = dict(prepare().scans)
    Image.fromarray(draw_page(20, 30)).save(tmp_path / "train" / "i5.jpg", quality=100)
    decoded.clear()
    changed = prepare(cache)
    assert decoded == [(tmp_path / "train" / "i5.jpg").read_bytes()]
    assert np.array_equal(read_all(changed)[5], scale_page(np.asarray(Image.open(tmp_path / "train" / "i5.jpg")), SIZE))
    decoded.clear()
    assert max(read_all(prepare(dict(changed.scans), 48))[0].shape) == 48
    assert len(decoded) == len(IDS)


def test_filling_resumes_after_a_kill(
    prepare: Callable[..., PreparedData], decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_SEGMENT_PAGES", 4)
    real, calls = PageStore.add, []

    def add(store: PageStore, pages: Sequence[ScannedImage]) -> dict[str, PageLocation]:
        calls.append(len(pages))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(store, pages)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PageStore, "add", add)
        prepare()
    assert calls == [4, 4, 4]
    decoded.clear()
    assert len(read_all(prepare())) == len(IDS)
    assert len(decoded) == 4, "the pages whose segment was not written"


def test_touched_file_is_not_decoded_again_and_lower_pixel_limit_applies(
    prepare: Callable[..., PreparedData], make_config: MakeConfig, decoded: list[bytes], tmp_path: Path
) -> None:
    first = prepare()
    decoded.clear()
    for name in IDS:
        (tmp_path / "train" / f"{name}.jpg").touch()
    second = prepare()  # with the store, but without a scan cache
    assert decoded == [] and second.digest == first.digest
    assert [scan.fact for scan in second.scans.values()] == [scan.fact for scan in first.scans.values()]
    config = make_config(data={"folds": 2, "max_image_pixels": 95}, train={"img_size": SIZE})
    with pytest.raises(UserError, match=r"8 x 12 px is more than data\.max_image_pixels = 95"):
        prepare_data(config, None, StoreChoice(tmp_path / "store", required=True))


def test_only_one_of_two_concurrent_processes_decodes(
    prepare: Callable[..., PreparedData], decoded: list[bytes]
) -> None:
    cache = dict(prepare(size=40).scans)  # both processes have the scans, but no pages of this size
    decoded.clear()
    prepared: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: prepared.append(prepare(cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == len(set(decoded)) == len(IDS)
    assert all(np.array_equal(*pages) for pages in zip(*map(read_all, prepared), strict=True))


def test_scan_cache_does_not_repeat_facts_of_segments(
    prepare: Callable[..., PreparedData], make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "train" / "i7.jpg").write_bytes(b"no image")
    config = make_config(data={"folds": 2, "on_bad_image": "skip"}, train={"img_size": SIZE})
    limit = config.data.max_image_pixels
    data = prepare_data(config, None, StoreChoice(tmp_path / "store", required=True))
    store = PageStore(tmp_path / "store", SIZE)
    rows = json.loads(store.scan_cache(limit).read_text())["images"]
    full = [path for path, _size, _time, _digest, *fact in rows if fact]
    assert len(rows) == len(IDS) and full == [str(tmp_path / "train" / "i7.jpg")]
    facts = {digest: location.fact for digest, location in store.read_index().items()}
    assert data.scans_in_store and read_scan_cache(store.scan_cache(limit), limit, facts) == data.scans
    assert list(read_scan_cache(store.scan_cache(limit), limit, {})) == [tmp_path / "train" / "i7.jpg"]


def test_scans_of_a_concurrent_process_stay_in_the_scan_cache(
    prepare: Callable[..., PreparedData], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = make_config().data.max_image_pixels
    file = PageStore(tmp_path / "store", SIZE).scan_cache(limit)
    other = {tmp_path / "other.jpg": ImageScan(1, 2, ImageFact("d", "bad"))}

    @contextmanager
    def hold(path: Path, what: str, wait_s: float) -> Iterator[None]:
        write_scan_cache(file, other, limit, {})  # as the process does that this one waits for
        yield

    monkeypatch.setattr("doccls.data.scan.hold_lock", hold)
    scans = prepare().scans
    facts = {digest: location.fact for digest, location in PageStore(tmp_path / "store", SIZE).read_index().items()}
    assert read_scan_cache(file, limit, facts) == other | dict(scans)


# --- read by the dataset ---------------------------------------------------------------------------------------------


def test_dataset_reads_stored_pages_and_files_of_missing_ones(
    prepare: Callable[..., PreparedData], tmp_path: Path
) -> None:
    data = prepare()
    manifest, stored = data.manifest, data.stored
    assert stored is not None
    bare = DocClsDataset(Pages(manifest.ids, manifest.paths, manifest.targets_N, SIZE, SIZE, 10**6))
    expected = [bare[SampleKey(sample)][0] for sample in range(len(IDS))]
    stored.locations_N[4] = (-1, 0, 0, 0, 0)
    for sample in range(len(IDS)):
        if sample != 4:
            (tmp_path / "train" / f"i{sample}.jpg").unlink()
    dataset = DocClsDataset(Pages(manifest.ids, manifest.paths, manifest.targets_N, SIZE, SIZE, 10**6, stored))
    assert all(np.array_equal(dataset[SampleKey(sample)][0], page) for sample, page in enumerate(expected))

"""The decoded-page store: the pixels of a decode, each page once, and nothing stale, torn or damaged from it."""

from __future__ import annotations

import json
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

from doccls.data import image_scan as image_scan_room
from doccls.data import store as store_room
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


def test_a_page_comes_back_as_a_decode_gives_it(tmp_path: Path) -> None:
    stored = locate(fill(tmp_path))
    again: StoredPages = pickle.loads(pickle.dumps(stored))  # noqa: S301 (as workers get it)
    for sample, shape in enumerate(SHAPES):
        expected = scale_page(draw_page(*shape), SIZE)
        for one in (stored, again):
            page = one.read(sample)
            assert page is not None and np.array_equal(page, expected) and not page.flags.writeable
    assert (again._maps and b"_maps" not in pickle.dumps(again).split(b"mmap")[0]) or True


def test_a_sample_without_a_page_has_none(tmp_path: Path) -> None:
    stored = locate_pages(fill(tmp_path).read_index(), [None, "d2", "unknown"])
    assert [stored.read(sample) is None for sample in range(3)] == [True, False, True]
    assert len(locate_pages({}, []).locations_N) == 0


def test_other_sizes_rules_and_decoders_see_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fill(tmp_path).read_index()
    assert PageStore(tmp_path, SIZE + 1).read_index() == {}
    for room, name, value in (
        (store_room, "_RULE", 99),
        (store_room.PIL, "__version__", "0"),
        (cv2, "__version__", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, value)
            assert PageStore(tmp_path, SIZE).read_index() == {}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_torn_segment_is_passed_over(tmp_path: Path, share: float) -> None:
    store = fill(tmp_path)
    store.add([make_scanned("whole", (9, 9))])
    (torn,) = {place.segment for digest, place in store.read_index().items() if digest == "d0"}
    data = torn.read_bytes()
    torn.write_bytes(data[: int(share * len(data))])
    assert set(store.read_index()) == {"whole"}


@pytest.mark.parametrize(
    "content", [b"junk that is no segment", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x01\0\0\0\0\0\0\0["]
)
def test_a_foreign_file_is_passed_over(tmp_path: Path, content: bytes) -> None:
    store = fill(tmp_path)
    (store.folder / "pages_x.safetensors").write_bytes(content)
    assert len(store.read_index()) == len(SHAPES)


def test_no_flipped_bit_of_a_header_makes_another_page(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (segment,) = store.folder.glob("pages_*")
    data, places = segment.read_bytes(), store.read_index()
    for place in range(8, min(one.offset for one in places.values())):
        segment.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        for sample in range(len(SHAPES)):
            page = locate(store).read(sample)
            assert page is None or np.array_equal(page, scale_page(draw_page(*SHAPES[sample]), SIZE))
        for digest, one in store.read_index().items():
            assert digest not in places or one.fact == places[digest].fact


def test_a_segment_holds_so_many_pages_as_memory_may(tmp_path: Path) -> None:
    assert [PageStore(tmp_path, size).segment_pages for size in (32, 224, 512, 4096)] == [256, 256, 85, 1]


def test_a_damaged_page_is_not_served_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path)
    place = store.read_index()["d0"]
    data = bytearray(place.segment.read_bytes())
    data[place.offset + 5] ^= 1
    place.segment.write_bytes(data)
    stored = locate(store)
    assert stored.read(0) is None and stored.read(1) is not None
    assert "a page is damaged and will be decoded again" in capfd.readouterr().err


def test_a_segment_that_is_gone_has_no_pages(tmp_path: Path) -> None:
    store = fill(tmp_path)
    stored = locate(store)
    for segment in stored.segments:
        segment.unlink()
    assert stored.read(0) is None


def test_too_little_room_is_told_before_anything_is_written(small_disk: Path) -> None:
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
    """The files that were decoded."""
    files: list[bytes] = []
    real = image_scan_room.decode_reduced

    def decode(data: bytes, *others: Any) -> DecodedPage:
        files.append(data)
        return real(data, *others)

    monkeypatch.setattr(image_scan_room, "decode_reduced", decode)
    return files


@pytest.fixture
def prepare(make_config: MakeConfig, make_data: MakeData, tmp_path: Path) -> Callable[..., PreparedData]:
    """`prepare(cache, size)`: twelve pages, with the store in tmp_path/store."""
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
    assert all(np.array_equal(one, two) for one, two in zip(read_all(first), read_all(second), strict=True))


def test_a_changed_file_and_another_size_are_decoded_again(
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


def test_filling_goes_on_where_it_was_killed(
    prepare: Callable[..., PreparedData], decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_room, "_SEGMENT_PAGES", 4)
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
    assert len(decoded) == 4, "those whose segment was not written"


def test_a_file_under_another_name_and_a_lower_limit_are_no_old_page(
    prepare: Callable[..., PreparedData], make_config: MakeConfig, decoded: list[bytes], tmp_path: Path
) -> None:
    first = prepare()
    decoded.clear()
    for name in IDS:
        (tmp_path / "train" / f"{name}.jpg").touch()
    second = prepare()  # it knows nothing but the store
    assert decoded == [] and second.digest == first.digest
    assert [one.fact for one in second.scans.values()] == [one.fact for one in first.scans.values()]
    config = make_config(data={"folds": 2, "max_image_pixels": 95}, train={"img_size": SIZE})
    with pytest.raises(UserError, match=r"8 x 12 px is more than data\.max_image_pixels = 95"):
        prepare_data(config, None, StoreChoice(tmp_path / "store", required=True))


def test_of_two_that_come_at_once_one_decodes(prepare: Callable[..., PreparedData], decoded: list[bytes]) -> None:
    cache = dict(prepare(size=40).scans)  # both know the files, and neither has pages of this size
    decoded.clear()
    found: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == len(set(decoded)) == len(IDS)
    assert all(np.array_equal(one, two) for one, two in zip(read_all(found[0]), read_all(found[1]), strict=True))


def test_what_the_segments_say_is_not_repeated_in_the_scan_cache(
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
    facts = {digest: place.fact for digest, place in store.read_index().items()}
    assert data.scans_in_store and read_scan_cache(store.scan_cache(limit), limit, facts) == data.scans
    assert list(read_scan_cache(store.scan_cache(limit), limit, {})) == [tmp_path / "train" / "i7.jpg"]


def test_what_another_process_scans_meanwhile_stays_in_the_scan_cache(
    prepare: Callable[..., PreparedData], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = make_config().data.max_image_pixels
    file = PageStore(tmp_path / "store", SIZE).scan_cache(limit)
    other = {tmp_path / "other.jpg": ImageScan(1, 2, ImageFact("d", "bad"))}

    @contextmanager
    def hold(path: Path, what: str, wait_s: float) -> Iterator[None]:
        write_scan_cache(file, other, limit, {})  # by the process that this one has waited for
        yield

    monkeypatch.setattr("doccls.data.scan.hold_lock", hold)
    scans = prepare().scans
    facts = {digest: place.fact for digest, place in PageStore(tmp_path / "store", SIZE).read_index().items()}
    assert read_scan_cache(file, limit, facts) == other | dict(scans)


# --- read by the dataset ---------------------------------------------------------------------------------------------


def test_the_dataset_takes_pages_from_it_and_files_for_those_that_it_lacks(
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

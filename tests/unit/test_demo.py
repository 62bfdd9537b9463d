"""The demo data set: reproducible bytes, an image for every row, and too hard for a linear model."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from doccls.demo.dataset import SIZE_PX, TEST, TRAIN, damage, make_page, write_demo
from doccls.demo.pages import CLASSES, draw_page

PAGES, TEST_PAGES = 30, 8


def read_rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as lines:
        return list(csv.DictReader(lines))


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, pages=PAGES, test_pages=TEST_PAGES)
    return folder


def test_same_call_writes_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=PAGES, test_pages=TEST_PAGES)
    assert read_files(tmp_path) == read_files(demo)


def test_rewriting_set_changes_nothing_and_leaves_no_partial_file(tmp_path: Path) -> None:
    write_demo(tmp_path, pages=2, test_pages=1)
    before = read_files(tmp_path)
    write_demo(tmp_path, pages=2, test_pages=1)
    assert read_files(tmp_path) == before
    assert not [name for name in before if name.endswith(".partial")]


def test_other_seed_writes_other_pages(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=4, test_pages=2, seed=1)
    images = {name: content for name, content in read_files(tmp_path).items() if name.endswith(".jpg")}
    assert len(images) == 6
    assert not set(images) & set(read_files(demo))
    assert not set(images.values()) & set(read_files(demo).values())


def test_folder_holds_two_tables_and_their_images_only(demo: Path) -> None:
    raw = demo / "data" / "raw"
    expected = set()
    for table, images, count in (("train.csv", "train", PAGES), ("sample_submission.csv", "test", TEST_PAGES)):
        rows = read_rows(raw / table)
        assert [tuple(row) for row in rows] == [("ID", "target")] * count
        names = {row["ID"].removesuffix(".jpg") for row in rows}
        assert len(names) == count
        assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in names)
        expected |= {f"data/raw/{table}", *(f"data/raw/{images}/{name}.jpg" for name in names)}
    assert set(read_files(demo)) == expected


def test_some_ids_lack_extension(demo: Path) -> None:
    ids = [row["ID"] for row in read_rows(demo / "data" / "raw" / "train.csv")]
    assert {image_id.endswith(".jpg") for image_id in ids} == {True, False}


def test_train_targets_are_class_names_and_sample_has_one_placeholder(demo: Path) -> None:
    targets = [row["target"] for row in read_rows(demo / "data" / "raw" / "train.csv")]
    assert set(targets) <= set(CLASSES)
    assert len(set(targets)) > len(CLASSES) // 2
    assert len({row["target"] for row in read_rows(demo / "data" / "raw" / "sample_submission.csv")}) == 1


def test_rows_are_shuffled_and_match_pages_made_separately(demo: Path) -> None:
    raw = demo / "data" / "raw"
    for split, table, images, count in (
        (TRAIN, "train.csv", "train", PAGES),
        (TEST, "sample_submission.csv", "test", TEST_PAGES),
    ):
        pages = {page.row_id: page for page in (make_page(0, split, index) for index in range(count))}
        rows = read_rows(raw / table)
        assert [row["ID"] for row in rows] != list(pages)
        assert {row["ID"] for row in rows} == set(pages)
        for row in rows:
            page = pages[row["ID"]]
            assert (raw / images / f"{page.name}.jpg").read_bytes() == page.jpeg
            assert split == TEST or row["target"] == page.target


def test_larger_set_contains_pages_of_smaller_one(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=PAGES // 3, test_pages=1)
    small = {name: content for name, content in read_files(tmp_path).items() if name.endswith(".jpg")}
    assert small.items() <= read_files(demo).items()


def test_test_page_differs_from_train_page_of_same_index() -> None:
    train, test = make_page(0, TRAIN, 3), make_page(0, TEST, 3)
    assert train.name != test.name, "one stream for both splits would draw the same page twice, damaged differently"
    assert train.jpeg != test.jpeg


def test_images_are_rgb_jpegs_of_expected_size(demo: Path) -> None:
    for path in (demo / "data" / "raw").glob("t*/*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, max(image.size)) == ("JPEG", "RGB", SIZE_PX)


@pytest.mark.parametrize("class_name", CLASSES)
def test_page_has_shape_and_ink_and_depends_on_rng_alone(class_name: str) -> None:
    page = draw_page(class_name, np.random.default_rng(5), 200)
    assert page.dtype == np.uint8
    assert page.ndim == 3 and page.shape[2] == 3 and max(page.shape) == 200
    assert page.std() > 5
    assert np.array_equal(page, draw_page(class_name, np.random.default_rng(5), 200))
    assert not np.array_equal(page, draw_page(class_name, np.random.default_rng(6), 200))


def test_every_class_draws_many_layouts() -> None:
    for class_name in CLASSES:
        for seed in range(15):
            page = draw_page(class_name, np.random.default_rng([9, seed]), 64)
            assert max(page.shape) == 64


def test_damage_grows_with_strength_and_keeps_its_input() -> None:
    page = draw_page("letter", np.random.default_rng(1), 160)
    before = page.copy()
    gap = []
    for strength in (0.0, 1.0, 2.0):
        worn = [damage(page, np.random.default_rng(seed), strength) for seed in range(40)]
        assert all(copy.dtype == np.uint8 and sorted(copy.shape) == sorted(page.shape) for copy in worn)
        gap.append(np.mean([np.abs(copy.astype(float) - page).mean() for copy in worn if copy.shape == page.shape]))
    assert np.array_equal(page, before)
    assert gap[0] < gap[1] < gap[2]


@pytest.mark.parametrize("arguments", [{"pages": 0}, {"test_pages": 0}, {"seed": -1}])
def test_count_or_seed_out_of_range_is_rejected_before_writing(arguments: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need pages >= 1"):
        write_demo(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_class_or_too_small_page_is_rejected() -> None:
    with pytest.raises(KeyError):
        draw_page("postcard", np.random.default_rng(0), 100)
    with pytest.raises(ValueError, match="at least 32"):
        draw_page("letter", np.random.default_rng(0), 16)


@pytest.mark.slow
def test_linear_model_on_thumbnails_fails() -> None:
    """This takes all 480 pages: with fewer, a linear model scores lower and the set would look harder than it is."""
    pages = [make_page(0, TRAIN, index) for index in range(480)]
    counts = Counter(page.target for page in pages)
    assert set(counts) == set(CLASSES)
    assert 1.3 < max(counts.values()) / min(counts.values()) < 3, "the classes should be mildly uneven"
    thumbnails, targets = [], [page.target for page in pages]
    for page in pages:
        grey = Image.open(io.BytesIO(page.jpeg)).convert("L")
        grey.thumbnail((32, 32))
        letterboxed = Image.new("L", (32, 32), 255)
        letterboxed.paste(grey, ((32 - grey.width) // 2, (32 - grey.height) // 2))
        thumbnails.append(np.asarray(letterboxed, np.float64).ravel())
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=0.02, max_iter=200))
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    guesses = cross_val_predict(model, np.stack(thumbnails), targets, cv=folds)
    score = f1_score(targets, guesses, average="macro")
    assert 1.5 / len(CLASSES) < score < 0.55

"""The demo data set: the same bytes every time, every row with its image, and too hard for a linear model."""

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


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as lines:
        return list(csv.DictReader(lines))


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, pages=PAGES, test_pages=TEST_PAGES)
    return folder


def test_the_same_call_writes_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=PAGES, test_pages=TEST_PAGES)
    assert files_under(tmp_path) == files_under(demo)


def test_writing_again_over_an_old_set_changes_nothing_and_leaves_no_partial_file(tmp_path: Path) -> None:
    write_demo(tmp_path, pages=2, test_pages=1)
    before = files_under(tmp_path)
    write_demo(tmp_path, pages=2, test_pages=1)
    assert files_under(tmp_path) == before
    assert not [name for name in before if name.endswith(".partial")]


def test_another_seed_writes_other_pages(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=4, test_pages=2, seed=1)
    images = {name: content for name, content in files_under(tmp_path).items() if name.endswith(".jpg")}
    assert len(images) == 6
    assert not set(images) & set(files_under(demo))
    assert not set(images.values()) & set(files_under(demo).values())


def test_the_folder_holds_two_tables_and_their_images_and_nothing_else(demo: Path) -> None:
    raw = demo / "data" / "raw"
    expected = set()
    for table, images, count in (("train.csv", "train", PAGES), ("sample_submission.csv", "test", TEST_PAGES)):
        rows = rows_of(raw / table)
        assert [tuple(row) for row in rows] == [("ID", "target")] * count
        names = {row["ID"].removesuffix(".jpg") for row in rows}
        assert len(names) == count
        assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in names)
        expected |= {f"data/raw/{table}", *(f"data/raw/{images}/{name}.jpg" for name in names)}
    assert set(files_under(demo)) == expected


def test_some_ids_have_an_extension_and_some_have_none(demo: Path) -> None:
    ids = [row["ID"] for row in rows_of(demo / "data" / "raw" / "train.csv")]
    assert {one.endswith(".jpg") for one in ids} == {True, False}


def test_train_targets_are_class_names_and_the_sample_holds_one_placeholder(demo: Path) -> None:
    targets = [row["target"] for row in rows_of(demo / "data" / "raw" / "train.csv")]
    assert set(targets) <= set(CLASSES)
    assert len(set(targets)) > len(CLASSES) // 2
    assert len({row["target"] for row in rows_of(demo / "data" / "raw" / "sample_submission.csv")}) == 1


def test_rows_are_shuffled_and_every_row_has_the_page_that_was_made_alone(demo: Path) -> None:
    raw = demo / "data" / "raw"
    for split, table, images, count in (
        (TRAIN, "train.csv", "train", PAGES),
        (TEST, "sample_submission.csv", "test", TEST_PAGES),
    ):
        alone = {page.row_id: page for page in (make_page(0, split, index) for index in range(count))}
        rows = rows_of(raw / table)
        assert [row["ID"] for row in rows] != list(alone)
        assert {row["ID"] for row in rows} == set(alone)
        for row in rows:
            page = alone[row["ID"]]
            assert (raw / images / f"{page.name}.jpg").read_bytes() == page.jpeg
            assert split == TEST or row["target"] == page.target


def test_a_larger_set_begins_with_the_pages_of_a_smaller_one(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, pages=PAGES // 3, test_pages=1)
    small = {name: content for name, content in files_under(tmp_path).items() if name.endswith(".jpg")}
    assert small.items() <= files_under(demo).items()


def test_a_test_page_is_not_the_train_page_of_the_same_number() -> None:
    train, test = make_page(0, TRAIN, 3), make_page(0, TEST, 3)
    assert train.name != test.name, "one stream for both splits would draw the same page twice, damaged differently"
    assert train.jpeg != test.jpeg


def test_written_images_are_rgb_jpegs_of_the_stated_size(demo: Path) -> None:
    for path in (demo / "data" / "raw").glob("t*/*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, max(image.size)) == ("JPEG", "RGB", SIZE_PX)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_page_has_the_stated_shape_ink_on_it_and_is_decided_by_its_stream(class_name: str) -> None:
    page = draw_page(class_name, np.random.default_rng(5), 200)
    assert page.dtype == np.uint8
    assert page.ndim == 3 and page.shape[2] == 3 and max(page.shape) == 200
    assert page.std() > 5
    assert np.array_equal(page, draw_page(class_name, np.random.default_rng(5), 200))
    assert not np.array_equal(page, draw_page(class_name, np.random.default_rng(6), 200))


def test_every_class_draws_many_layouts_without_a_fault() -> None:
    for class_name in CLASSES:
        for seed in range(15):
            page = draw_page(class_name, np.random.default_rng([9, seed]), 64)
            assert max(page.shape) == 64


def test_damage_keeps_the_page_it_was_given_and_grows_with_strength() -> None:
    page = draw_page("letter", np.random.default_rng(1), 160)
    before = page.copy()
    gap = []
    for strength in (0.0, 1.0, 2.0):
        worn = [damage(page, np.random.default_rng(seed), strength) for seed in range(40)]
        assert all(one.dtype == np.uint8 and sorted(one.shape) == sorted(page.shape) for one in worn)
        gap.append(np.mean([np.abs(one.astype(float) - page).mean() for one in worn if one.shape == page.shape]))
    assert np.array_equal(page, before)
    assert gap[0] < gap[1] < gap[2]


@pytest.mark.parametrize("arguments", [{"pages": 0}, {"test_pages": 0}, {"seed": -1}])
def test_a_count_or_seed_out_of_range_is_refused_before_anything_is_written(
    arguments: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="need pages >= 1"):
        write_demo(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_unknown_class_or_a_page_too_small_to_read_is_refused() -> None:
    with pytest.raises(KeyError):
        draw_page("postcard", np.random.default_rng(0), 100)
    with pytest.raises(ValueError, match="at least 32"):
        draw_page("letter", np.random.default_rng(0), 16)


@pytest.mark.slow
def test_a_linear_model_on_thumbnails_fails() -> None:
    """All 480 pages: a subset would flatter the set, as a linear model gains from more pages."""
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

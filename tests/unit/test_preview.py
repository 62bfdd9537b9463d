"""`doccls preview`: its cells are the dataset's pages, its choice covers the classes, and it never harms the data."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from doccls import preview
from doccls.__main__ import main
from doccls.config import Config
from doccls.config.load import load_with_warnings
from doccls.data.dataset import AugmentationKey, SampleKey, build_dataset
from doccls.data.manifest import read_manifest
from doccls.preview import Heading, Layout, PreviewRow, choose_samples, find_cell_px, render_picture, shorten
from tests.unit.conftest import MakeData

AUGMENT = {"rotate_deg": 20, "hflip_prob": 0.5, "noise_prob": 0.5}
RunPreview = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write_config(make_data: MakeData, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes images of the labels and a config of 64 px, and returns the config's path."""

    def write(labels: list[str], data: dict[str, object] | None = None, **sections: dict[str, object]) -> Path:
        make_data([f"i{number}" for number in range(len(labels))], labels)
        content = {
            "data": {"train_csv": "train.csv", "image_dir_train": "train", "folds": 2, **(data or {})},
            "train": {"img_size": 64},
            "augment": AUGMENT,
            **sections,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def run_preview(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPreview:
    """A function that runs `doccls preview` in tmp_path and returns exit code, stdout and stderr."""

    def run(config: Path, *args: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        code = main(["preview", "--config", str(config), *map(str, args)])
        return code, *capsys.readouterr()

    return run


def load(config: Path) -> Config:
    return load_with_warnings(config, None, []).config


def snapshot_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("level", ["none", "light", "scan"])
def test_cells_are_the_pages_of_training_and_validation(
    level: str, write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path
) -> None:
    path = write_config(["a", "b"] * 7, {"valid_fold": 1}, valid={"damage": level}, project={"seed": 9})
    code, out, err = run_preview(path)
    assert (code, err) == (0, "") and out.endswith(f"[PREVIEW] 12 pages: {tmp_path / 'preview.png'}\n")
    config = load(path)
    shown = Config.model_validate(config.model_dump() | {"valid": {"damage": "scan" if level == "none" else level}})
    manifest = read_manifest(config.data)
    dataset, layout = build_dataset(shown, manifest), Layout(12, 5, 128)
    picture = np.asarray(Image.open(tmp_path / "preview.png"))
    assert picture.shape == (*layout.size_px[::-1], 3)
    samples = choose_samples(manifest.targets_N, lambda sample: True)
    for row, sample in enumerate(samples):
        keys = [
            SampleKey(sample),
            *(SampleKey(sample, AugmentationKey(1, epoch)) for epoch in range(3)),
            SampleKey(sample, is_damaged=True),
        ]
        for column, key in enumerate(keys):
            left, top = layout.locate(row, column)
            cell = picture[top : top + 128, left : left + 128]
            assert np.array_equal(cell, dataset[key][0].repeat(2, axis=0).repeat(2, axis=1)), (row, column)


def test_headings_name_the_fold_the_epochs_and_the_level(write_config: Callable[..., Path]) -> None:
    headings = preview.list_headings(load(write_config(["a", "b"], valid={"damage": "light"})))
    assert [heading.title for heading in headings] == [
        "clean", "augmented, epoch 1", "augmented, epoch 2", "augmented, epoch 3", "damaged: light",
    ]  # fmt: skip
    assert [heading.note for heading in headings] == ["as validated", *["as in fold 0"] * 3, "as validated"]
    off = preview.list_headings(load(write_config(["a", "b"])))[-1]
    assert off == Heading("damaged: scan", "valid.damage: none")


@pytest.mark.parametrize(("size_px", "cell_px"), [(32, 160), (64, 128), (96, 192), (160, 160), (200, 200), (384, 160)])
def test_large_pages_are_shrunk_and_small_ones_enlarged_by_whole_factors(size_px: int, cell_px: int) -> None:
    assert find_cell_px(size_px) == cell_px
    variant = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    resized = preview.resize_variant(variant, cell_px)
    if size_px > cell_px:
        assert np.array_equal(resized, cv2.resize(variant, (cell_px, cell_px), interpolation=cv2.INTER_AREA))
    else:
        factor = cell_px // size_px
        assert np.array_equal(resized, variant.repeat(factor, axis=0).repeat(factor, axis=1))


@pytest.mark.parametrize("name", ["again.png", "again.PNG"])
def test_equal_configs_give_equal_bytes_and_replace_an_earlier_preview(
    name: str, write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path
) -> None:
    path = write_config(["a", "b", "c"])
    assert run_preview(path, "--output", name)[0] == 0
    first = (tmp_path / name).read_bytes()
    assert Image.open(io.BytesIO(first)).format == "PNG"
    assert run_preview(path, "--output", name)[0] == 0
    assert (tmp_path / name).read_bytes() == first
    assert run_preview(path, "--output", name, "--set", "project.seed=1")[0] == 0
    assert (tmp_path / name).read_bytes() != first


def test_decodes_no_page_that_it_does_not_show_and_fills_no_store(
    write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path
) -> None:
    path = write_config(["a", "b"] * 20)
    manifest = read_manifest(load(path).data)
    shown = choose_samples(manifest.targets_N, lambda sample: True)
    for sample in set(range(40)) - set(shown):
        (tmp_path / "train" / f"i{sample}.jpg").write_bytes(b"not an image")
    assert run_preview(path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "preview.png", "train", "train.csv"]


# --- choice ----------------------------------------------------------------------------------------------------------


def choose(targets: list[int], unusable: set[int] = frozenset()) -> list[int]:  # type: ignore[assignment]
    return choose_samples(np.array(targets), lambda sample: sample not in unusable)


def test_every_class_is_shown_first_in_order_of_classes() -> None:
    targets = [number % 5 for number in range(100)]
    chosen = choose(targets)
    assert len(set(chosen)) == 12
    assert [targets[sample] for sample in chosen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert min(chosen) < 10 and max(chosen) > 90  # spread over the table


def test_of_many_classes_those_spread_over_the_order_are_shown() -> None:
    targets = list(range(34)) * 2
    chosen = [targets[sample] for sample in choose(targets)]
    assert chosen == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]


def test_few_and_rare_samples_are_all_shown() -> None:
    assert choose([0, 1, 1]) == [0, 1, 2]
    assert sorted(choose([0] * 11 + [1])) == list(range(12))


def test_unusable_samples_are_replaced_by_others_of_the_class_or_of_another_class() -> None:
    assert choose([0, 0, 1], {0}) == [1, 2]
    targets = list(range(24))
    assert 3 not in choose(targets) and len(choose(targets, {0, 23})) == 12
    assert choose([0, 1], {0, 1}) == []


def test_only_chosen_samples_are_asked_for() -> None:
    asked: list[int] = []
    chosen = choose_samples(np.arange(1000) % 3, lambda sample: not asked.append(sample))  # type: ignore[func-returns-value]
    assert sorted(asked) == sorted(chosen)


def test_bad_images_are_an_error_or_skipped_with_a_warning(
    write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path
) -> None:
    path = write_config(["a", "a", "b"])
    (tmp_path / "train" / "i0.jpg").write_bytes(b"not an image")
    code, out, err = run_preview(path)
    assert code == 1 and "ID 'i0'" in err and "not an image" in err and "data.on_bad_image: skip" in err
    assert not (tmp_path / "preview.png").exists()
    (tmp_path / "train" / "i1.jpg").unlink()
    code, out, err = run_preview(path, "--set", "data.on_bad_image=skip")
    assert (code, err) == (0, "") and "[PREVIEW] 1 pages" not in out and "[PREVIEW] 1 page:" in out
    assert "[WARNING] an image that can't be used is not shown: " in out
    (tmp_path / "train" / "i2.jpg").write_bytes(b"")
    assert "no row has a usable image" in run_preview(path, "--set", "data.on_bad_image=skip")[2]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("train/new.png", "is in a folder of the images"),
        ("train/deeper/new.png", "is in a folder of the images"),
        ("link to train/new.png", "is in a folder of the images"),
        ("link to image.png", "must end in .png"),
        ("test/new.png", "is in a folder of the images"),
        ("linked by train/new.png", "is in a folder of the images"),
        ("train.csv", "must end in .png"),
        ("preview", "must end in .png"),
        ("preview.jpg", "must end in .png"),
        ("table.png", "is not an earlier preview"),
        ("photo.png", "is not an earlier preview"),
        ("a JPEG.png", "is not an earlier preview"),
        ("folder.png", "it is a folder"),
        ("missing/preview.png", "no such folder"),
        ("photo.png/preview.png", "is a file"),
        ("broken.png", "does not exist"),
        ("x" * 300 + ".png", "too long"),
    ],
)
def test_refuses_in_words_and_leaves_all_files_as_they_are(
    output: str, message: str, write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path
) -> None:
    path = write_config(["a", "b"], {"image_dir_test": "test", "train_csv": "table.png"})
    (tmp_path / "train.csv").rename(tmp_path / "table.png")
    for folder in ("test", "folder.png", "train/deeper", "linked by train"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link to train").symlink_to(tmp_path / "train")
    (tmp_path / "link to image.png").symlink_to(tmp_path / "train" / "i0.jpg")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    (tmp_path / "train" / "i1.jpg").rename(tmp_path / "linked by train" / "i1.jpg")
    (tmp_path / "train" / "i1.jpg").symlink_to(tmp_path / "linked by train" / "i1.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "a JPEG.png", "JPEG", comment=preview._MARK)
    before = snapshot_files(tmp_path)
    code, out, err = run_preview(path, "--output", output)
    assert code == 1 and err.startswith("doccls preview: --output: ") and message in err
    assert "Traceback" not in err and "[PREVIEW]" not in out
    assert snapshot_files(tmp_path) == before


def test_file_that_appears_meanwhile_is_not_replaced(
    write_config: Callable[..., Path], run_preview: RunPreview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(rows: Sequence[PreviewRow], headings: Sequence[Heading]) -> Image.Image:
        (tmp_path / "preview.png").write_bytes(b"of another program")
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(preview, "render_picture", render)
    code, _, err = run_preview(write_config(["a", "b"]))
    assert code == 1 and "is not an earlier preview" in err
    assert (tmp_path / "preview.png").read_bytes() == b"of another program"


def test_failed_write_is_an_error_in_words(
    write_config: Callable[..., Path], run_preview: RunPreview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(preview, "write_bytes", fail)
    code, _, err = run_preview(write_config(["a", "b"]))
    assert code == 1 and err.startswith("doccls preview: --output: ") and "Input/output error" in err


def test_warnings_of_the_config_and_the_table_are_printed(
    write_config: Callable[..., Path], run_preview: RunPreview
) -> None:
    code, out, _ = run_preview(write_config(["a", "a", "b"], train={"img_size": 64, "mix_prob": 0.5}))
    assert code == 0 and "[WARNING] train.mix_prob" in out
    assert "[WARNING] classes with fewer samples than the 2 folds" in out


# --- texts -----------------------------------------------------------------------------------------------------------

HOSTILE = [
    "", "x" * 100_000, "two\nlines\tand\0nul", "\u202eright to left", "Счёт", "請求書", "فاتورة", "\U0001f9fe",
    "\ud800", "%s {} <b>&amp;</b>", "a\u0301" * 500,
]  # fmt: skip


@pytest.mark.parametrize("fonts", [preview._FONTS, ()], ids=["installed fonts", "Pillow's font"])
def test_hostile_and_long_labels_stay_in_their_block(fonts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_FONTS", fonts)
    page = np.full((32, 32, 3), 255, np.uint8)
    headings = [Heading(text, text) for text in HOSTILE[:5]]
    rows = [PreviewRow(text, text, (page,) * 5) for text in HOSTILE]
    picture, layout = np.asarray(render_picture(rows, headings)), Layout(len(rows), 5, 160)
    is_free = (picture == picture[0, 0]).all(axis=2)
    between = layout.locate(6, 0)[0] - preview._GAP_PX
    assert is_free[:, between : between + 3].all() and is_free[:, -3:].all() and is_free[-3:].all()
    for row in range(len(rows)):
        for column in range(5):
            left, top = layout.locate(row, column)
            assert (picture[top : top + 160, left : left + 160] == 255).all()


def test_long_texts_keep_start_and_end() -> None:
    font = preview._load_font()
    short = shorten("start" + "x" * 10_000 + "end", 200, font)
    assert short.startswith("start") and short.endswith("end") and "..." in short and font.getlength(short) <= 200
    assert shorten("short", 200, font) == "short"
    assert shorten("a\nb\0c\u202ed\u3000e", 200, font) == "a b?cd e"


def test_labels_and_ids_are_drawn() -> None:
    page = np.zeros((160, 160, 3), np.uint8)
    pictures = {
        render_picture([PreviewRow(label, sample_id, (page,) * 5)], [Heading(title, "")] * 5).tobytes()
        for label, sample_id, title in [("a", "i", "t"), ("b", "i", "t"), ("a", "j", "t"), ("a", "i", "u")]
    }
    assert len(pictures) == 4


@pytest.mark.parametrize("fonts", [preview._FONTS, ()], ids=["installed fonts", "Pillow's font"])
def test_headings_fit_over_their_columns(
    fonts: tuple[str, ...], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_FONTS", fonts)
    font = preview._load_font()
    for level in ("none", "light", "scan"):
        for heading in preview.list_headings(load(write_config(["a", "b"], valid={"damage": level}))):
            assert max(font.getlength(heading.title), font.getlength(heading.note)) <= preview._CELL_PX

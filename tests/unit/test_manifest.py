"""The manifest of train.csv and its images: valid IDs, and the problems that are reported before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doccls.config import Config
from doccls.config.schema import IMAGE_EXTENSIONS
from doccls.data.manifest import (
    Manifest,
    check_paths,
    list_candidates,
    order_classes,
    read_manifest,
    read_table,
    resolve_images,
)
from doccls.data.prepare import describe_folds, prepare_data
from doccls.errors import UserError

MakeConfig = Callable[..., Config]
MakeData = Callable[..., Path]
Read = Callable[..., Manifest]


@pytest.fixture
def read(make_config: MakeConfig) -> Read:
    """Return `read(folds=2)`, which reads the manifest of tmp_path/train.csv with the given `data` keys."""
    return lambda **data: read_manifest(make_config(data={"folds": 2, **data}).data)


@pytest.fixture
def reject(read: Read) -> Callable[..., str]:
    def act(**data: object) -> str:
        with pytest.raises(UserError) as caught:
            read(**data)
        return str(caught.value)

    return act


# --- IDs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_id", "file"),
    [
        ("abc", "abc.jpg"),
        ("abc.jpg", "abc.jpg"),
        ("abc.JPG", "abc.JPG"),
        ("abc.JPG", "abc.jpg"),
        ("abc.jpg", "abc.JPG"),
        ("abc.Jpeg", "abc.jpeg"),
        ("abc", "abc.PNG"),
        ("abc", "abc.tiff"),
        ("abc", "ABC.jpg"),
        ("a.b.c", "a.b.c.jpg"),
        ("v1.2", "v1.2.png"),
        ("scan.2024.01.jpg", "scan.2024.01.jpg"),
        ("sub/abc", "sub/abc.jpg"),
        ("sub/deep/abc.png", "sub/deep/abc.png"),
        (".hidden", ".hidden.jpg"),
        ("with space", "with space.jpg"),
        ("größe", "größe.jpg"),
        ("a,b\"c", "a,b\"c.jpg"),
        ("./abc", "abc.jpg"),
    ],
)  # fmt: skip
def test_id_resolves_to_its_file(make_data: MakeData, read: Read, sample_id: str, file: str) -> None:
    folder = make_data([sample_id, "other"], ["0", "1"], files=[file, "other.jpg"])
    manifest = read()
    assert tuple(manifest.ids) == (sample_id, "other")
    path = manifest.paths[0]
    assert path is not None and path.samefile(folder / "train" / file)


def test_configured_extension_is_tried_first(make_data: MakeData, read: Read) -> None:
    folder = make_data(["a", "b"], ["0", "1"], files=["a.jpg", "a.png", "b.jpg"])
    assert tuple(read().paths) == (folder / "train/a.jpg", folder / "train/b.jpg")
    assert tuple(read(image_ext="PNG").paths) == (folder / "train/a.png", folder / "train/b.jpg")


def test_exact_case_wins_over_other_case(make_data: MakeData, read: Read) -> None:
    folder = make_data(["A.jpg", "a.jpg"], ["0", "1"], files=["A.jpg", "a.jpg"])
    assert tuple(read().paths) == (folder / "train/A.jpg", folder / "train/a.jpg")


@pytest.mark.parametrize("sample_id", ["x.jpg", "x.JPG", "x.jpeg", "x.Png", "sub/x.tif", "x.y.webp", "x.jpg.jpg"])
def test_id_with_known_extension_is_the_only_candidate(sample_id: str) -> None:
    assert list_candidates(sample_id, ".jpg") == (sample_id,)


@pytest.mark.parametrize("sample_id", ["x", "x.y", "v1.2", "x.pdf", "x.", ".x"])
def test_id_without_known_extension_gets_each_extension_once(sample_id: str) -> None:
    candidates = list_candidates(sample_id, ".png")
    assert candidates[0] == f"{sample_id}.png"
    assert len(set(candidates)) == len(candidates) == len(IMAGE_EXTENSIONS)
    assert all(name.startswith(f"{sample_id}.") for name in candidates)


def test_folder_is_not_an_image(make_data: MakeData, reject: Callable[..., str], tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"], files=["b.jpg"])
    (tmp_path / "train" / "a.jpg").mkdir()
    assert "images missing" in reject()


ESCAPING = (
    "/etc/passwd", "../secret", "a/../../secret", "..", "sub/..", "..\\secret", "a\\..\\..\\secret", "C:\\secret",
    "C:secret", "\\\\host\\share", "\\secret", "//host/x", "", "  ", "a\0b", "/", "secret/../secret",
)  # fmt: skip


@pytest.mark.parametrize("sample_id", ESCAPING)
def test_id_that_leaves_the_folder_is_rejected_without_listing_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_id: str
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    listed: list[Path] = []
    monkeypatch.setattr("doccls.data.manifest.os.scandir", lambda folder: listed.append(folder) or iter(()))
    images = resolve_images([sample_id], tmp_path / "train", ".jpg")
    assert images.names == (None,) and not images.missing and not listed
    assert images.refused is not None
    assert "leave the image folder" in images.refused and f"line 2: ID {sample_id!r}" in images.refused


def test_one_error_lists_all_escaping_ids(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data(["../a", "b", "/c", ""], ["0", "1", "0", "1"], files=["b.jpg"])
    message = reject(on_bad_image="skip")
    assert "leave the image folder (absolute, or with `..`): 3" in message
    assert "line 2: ID '../a'" in message and "line 4: ID '/c'" in message and "line 5: ID ''" in message


def test_dots_inside_a_name_are_allowed(make_data: MakeData, read: Read) -> None:
    make_data(["a..b", "...c"], ["0", "1"], files=["a..b.jpg", "...c.jpg"])
    assert None not in read().paths


@pytest.mark.parametrize("ids", [("NA", "nan"), ("007", "7"), ("1e5", "100000"), ("True", "null"), ("1.0", "1")])
def test_ids_stay_as_written(make_data: MakeData, read: Read, ids: tuple[str, ...]) -> None:
    make_data(ids, ["0", "1"])
    assert tuple(read().ids) == ids


# --- missing images --------------------------------------------------------------------------------------------------


def test_missing_images_are_counted_with_all_tried_paths(
    make_data: MakeData, reject: Callable[..., str], tmp_path: Path
) -> None:
    ids = [f"id{number}" for number in range(25)]
    make_data(["have", "gone.png", *ids], ["0", "1"] * 13 + ["0"], files=["have.jpg"])
    message = reject()
    assert f"images missing in {tmp_path / 'train'} (data.image_dir_train): 26" in message
    assert f"line 3: ID 'gone.png': tried {tmp_path / 'train' / 'gone.png'}\n" in message
    line = next(line for line in message.splitlines() if "'id0'" in line)
    for candidate in list_candidates("id0", ".jpg"):
        assert str(tmp_path / "train" / candidate) in line
    assert "... and 16 more" in message


def test_missing_images_are_a_warning_if_bad_images_are_skipped(make_data: MakeData, read: Read) -> None:
    make_data(["a", "b", "c"], ["0", "1", "0"], files=["a.jpg", "b.jpg"])
    manifest = read(on_bad_image="skip")
    assert manifest.paths[2] is None and None not in manifest.paths[:2]
    assert any("images missing" in warning and "'c'" in warning for warning in manifest.warnings)


def test_bad_image_is_reported_before_training_or_skipped(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    make_data([f"i{n}" for n in range(8)], ["0", "1"] * 4)
    (tmp_path / "train" / "i3.jpg").write_bytes(b"this is no image")
    (tmp_path / "train" / "i5.jpg").write_bytes((tmp_path / "train" / "i5.jpg").read_bytes()[:200])
    (tmp_path / "train" / "i6.jpg").unlink()
    with pytest.raises(UserError) as caught:
        prepare_data(make_config(data={"folds": 2, "on_bad_image": "error"}))
    assert "images missing" in str(caught.value) and "'i6'" in str(caught.value)
    (tmp_path / "train" / "i6.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        prepare_data(make_config(data={"folds": 2}))
    message = str(caught.value)
    assert "images that can't be used: 3" in message and "data.on_bad_image: skip" in message
    assert all(f"ID 'i{n}'" in message and f"i{n}.jpg" in message for n in (3, 5, 6))
    (tmp_path / "train" / "i6.jpg").unlink()
    prepared = prepare_data(make_config(data={"folds": 2, "on_bad_image": "skip"}))
    assert prepared.skipped == {3, 5, 6}
    used = [*prepared.list_train(0), *prepared.list_valid(0)]
    assert sorted(used) == [0, 1, 2, 4, 7]
    assert any("3 rows are left out" in warning for warning in prepared.warnings)


def test_data_digest_depends_on_content_and_labels_not_on_spelling(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    def digest() -> str:
        return prepare_data(make_config(data={"folds": 2})).digest

    make_data(["a", "b", "c", "d"], ["0", "1", "0", "1"])
    plain = digest()
    files = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    make_data(["a.jpg", "B.JPG", "c", "./d"], ["0", "1", "0", "1"], files=files)
    assert digest() == plain
    make_data(["a", "b", "c", "d"], ["0", "1", "1", "0"])
    assert digest() != plain
    make_data(["b", "a", "c", "d"], ["0", "1", "0", "1"], files=files)
    assert digest() != plain
    make_data(["a", "b", "c", "d"], ["x", "y", "x", "y"])
    assert digest() != plain


def copy_page(folder: Path, source: str, target: str) -> None:
    (folder / "train" / target).write_bytes((folder / "train" / source).read_bytes())


def test_duplicate_images_are_reported_with_conflicting_labels_first_and_share_a_fold(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    make_data([f"i{n}" for n in range(12)], ["0", "1"] * 6)
    copy_page(tmp_path, "i2.jpg", "i8.jpg")  # the same label
    copy_page(tmp_path, "i3.jpg", "i6.jpg")  # a different label
    prepared = prepare_data(make_config(data={"folds": 3}))
    (warning,) = prepared.warnings
    assert warning.startswith("duplicate images under different file names (1 with conflicting labels): 2\n")
    conflict = "lines 5 and 8: IDs 'i3', 'i6', labels differ: ['1', '0']"
    assert warning.index(conflict) < warning.index("lines 4 and 10: IDs")
    folds = prepared.assignment.fold_of_N
    assert folds[2] == folds[8] and folds[3] == folds[6]
    with pytest.raises(UserError, match=r"under different file names.*\n(.*\n)*.*data.on_duplicate: keep"):
        prepare_data(make_config(data={"folds": 3, "on_duplicate": "error"}))


def test_same_page_in_other_format_or_with_other_metadata_is_a_duplicate(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    files = ["a.png", "b.bmp", "c.png", "d.png", "e.tif", "f.png"]
    make_data(files, ["0", "1"] * 3, files=files)
    page = Image.open(tmp_path / "train" / "a.png").convert("RGB")
    page.save(tmp_path / "train" / "b.bmp")
    page.save(tmp_path / "train" / "e.tif", dpi=(300, 300))
    turned = Image.Exif()
    turned[0x0112] = 3
    page.rotate(180).save(tmp_path / "train" / "f.png", exif=turned)
    prepared = prepare_data(make_config(data={"folds": 3, "stratify": False}))
    assert "lines 2 and 3 and 6 and 7: IDs 'a.png', 'b.bmp', 'e.tif', 'f.png'" in prepared.warnings[0]
    assert len(set(prepared.assignment.fold_of_N[[0, 1, 4, 5]])) == 1


def test_large_jpeg_is_recognized_in_other_formats_and_other_jpegs(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    files = ["a.jpg", "b.jpg", "c.png", "d.jpg", "e.jpg", "f.jpg"]
    make_data(files, ["0", "1"] * 3, files=files)
    noise, folder = np.random.default_rng(0), tmp_path / "train"
    for name, size in (("a.jpg", 600), ("d.jpg", 600), ("e.jpg", 700)):
        Image.fromarray(noise.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name)
    config = make_config(data={"folds": 3, "stratify": False}, train={"img_size": 64})
    (folder / "f.jpg").write_bytes((folder / "e.jpg").read_bytes() + b"another file")
    (warning,) = [line for line in prepare_data(config).warnings if "different file names" in line]
    assert "lines 6 and 7: IDs 'e.jpg', 'f.jpg'" in warning
    Image.open(folder / "a.jpg").save(folder / "c.png")
    prepared = prepare_data(config)
    assert "lines 2 and 4: IDs 'a.jpg', 'c.png'" in prepared.warnings[0] and "lines 6 and 7" in prepared.warnings[0]
    reduced = [prepared.scans[folder / name].fact.reduced for name in files]
    assert reduced == [1, 1, 1, 1, 4, 4], "JPEGs of the PNG's size are compared at full size"
    cached = prepare_data(config, prepared.scans)
    assert (cached.warnings, cached.scans) == (prepared.warnings, prepared.scans)


def test_multi_page_files_are_reported(make_data: MakeData, make_config: MakeConfig, tmp_path: Path) -> None:
    make_data(["a.tif", "b.tif", "c.tif", "d.tif"], ["0", "1"] * 2, files=["a.tif", "b.tif", "c.tif", "d.tif"])
    pages = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "train" / "c.tif", save_all=True, append_images=pages[1:])
    prepared = prepare_data(make_config(data={"folds": 2}))
    warning = f"multi-page files (only the first page is used): 1\n    {tmp_path / 'train' / 'c.tif'}: 2"
    assert prepared.warnings == (warning,)
    assert prepare_data(make_config(data={"folds": 2}), prepared.scans).warnings == (warning,), (
        "also from the scan cache"
    )


def test_class_in_a_single_fold_is_reported_with_its_fold_and_groups(
    make_data: MakeData, make_config: MakeConfig
) -> None:
    labels = ["ring", "box", "stamp"] * 12
    groups = ["doc" if label == "stamp" else f"d{row // 3 % 6}" for row, label in enumerate(labels)]
    make_data([f"i{row}" for row in range(36)], labels, extra={"doc": groups})
    prepared = prepare_data(make_config(data={"folds": 3, "group_col": "doc"}))
    (fold,) = set(prepared.assignment.fold_of_N[2::3])
    assert prepared.warnings == (
        f"classes validated by a model that never trained on them: 1\n    stamp: all 12 samples in fold {fold}",
        "classes in fewer groups of 'doc' than the 3 folds (missing from some folds): 1\n"
        "    stamp (groups: 1, samples: 12)",
    )
    lines = describe_folds(prepared)
    assert lines[1:3] == ["class box   :  4  4  4", "class ring  :  4  4  4"]
    assert sorted(lines[3].split()) == sorted(["class", "stamp", ":", "12", "0", "0"])


def test_class_counts_include_only_usable_rows(make_data: MakeData, make_config: MakeConfig, tmp_path: Path) -> None:
    make_data(list("abcdef"), ["0", "1"] * 3, extra={"fold": list("001122")})
    for name in "ac":
        (tmp_path / "train" / f"{name}.jpg").write_bytes(b"no image")
    prepared = prepare_data(make_config(data={"folds": 3, "on_bad_image": "skip"}))
    assert prepared.counts_CF.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert "    0: all 1 samples in fold 2" in prepared.warnings[-1]


def test_fold_without_usable_image_is_rejected(make_data: MakeData, make_config: MakeConfig) -> None:
    make_data(["a", "b", "c", "d"], ["0", "1", "0", "1"], files=["a.jpg", "b.jpg"], extra={"fold": list("0011")})
    with pytest.raises(UserError, match="no usable image is left"):
        prepare_data(make_config(data={"folds": 2, "on_bad_image": "skip"}))


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", "  ", "NaN", "nan", "NA", "n/a", "None", "null", "<NA>"])
def test_empty_targets_are_reported_by_line(make_data: MakeData, reject: Callable[..., str], empty: str) -> None:
    make_data(["a", "b", "c", "d"], ["0", empty, "1", empty])
    message = reject()
    assert "rows without a 'target' (empty, nan, na, n/a, none, null): 2" in message
    assert "line 3: ID 'b'" in message and "line 5: ID 'd'" in message


def test_classes_are_sorted_by_number_if_all_are_numbers_else_by_text() -> None:
    assert order_classes(["10", "9", "2", "9"]) == ("2", "9", "10")
    assert order_classes(["1.5", "-3", "1e1"]) == ("-3", "1.5", "1e1")
    assert order_classes(["10", "9", "b"]) == ("10", "9", "b")
    assert order_classes(["b", "a", "B"]) == ("B", "a", "b")


def test_targets_are_indices_into_classes(make_data: MakeData, read: Read) -> None:
    make_data(["a", "b", "c", "d"], ["10", "9", " 9 ", "10"])
    manifest = read()
    assert manifest.classes == ("9", "10")
    assert manifest.targets_N.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("labels", [["1", "01"], ["1", "1.0"], ["2", "3", "03"], ["0", "-0"], ["1e1", "10"]])
def test_number_in_two_spellings_is_rejected(
    make_data: MakeData, reject: Callable[..., str], labels: list[str]
) -> None:
    make_data([f"i{n}" for n in range(len(labels))], labels)
    assert "are the same number, spelled differently" in reject()


def test_numeric_spellings_are_distinct_among_text_labels(make_data: MakeData, read: Read) -> None:
    make_data(["a", "b", "c"], ["1", "01", "x"])
    assert read().classes == ("01", "1", "x")


@pytest.mark.parametrize("label", ["inf", "infinity"])
def test_infinity_as_a_label_is_accepted(make_data: MakeData, read: Read, label: str) -> None:
    make_data(["a", "b"], [label, "letter"])
    assert set(read().classes) == {label, "letter"}


def test_single_class_is_rejected(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data(["a", "b"], ["x", "x"])
    assert "at least two classes" in reject()


def test_class_with_fewer_samples_than_folds_gives_a_warning(make_data: MakeData, read: Read) -> None:
    make_data([f"i{n}" for n in range(7)], ["a"] * 5 + ["rare"] * 2)
    warnings = read(folds=5).warnings
    assert len(warnings) == 1
    assert "fewer samples than the 5 folds" in warnings[0] and "rare (2)" in warnings[0] and "a (5)" not in warnings[0]


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_rows_of_one_image_are_found_in_any_spelling(
    make_data: MakeData, read: Read, reject: Callable[..., str]
) -> None:
    make_data(["a", "a.jpg", "A.JPG", "b", "b"], ["0", "0", "1", "1", "1"], files=["a.jpg", "b.jpg"])
    (warning,) = [line for line in read().warnings if "more than one row" in line]
    assert "images named by more than one row: 2" in warning
    assert "lines 2 and 3 and 4: ID 'a', labels differ: ['0', '0', '1']" in warning
    assert "lines 5 and 6: ID 'b'\n" in warning
    assert len(read()) == 5
    assert "images named by more than one row: 2" in reject(on_duplicate="error")


# --- the table -------------------------------------------------------------------------------------------------------


def test_byte_order_mark_is_ignored(make_data: MakeData, read: Read, tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"])
    table = tmp_path / "train.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert tuple(read().ids) == ("a", "b")


def test_missing_column_error_names_key_and_existing_columns(
    make_data: MakeData, reject: Callable[..., str], tmp_path: Path
) -> None:
    make_data(["a", "b"], ["0", "1"], extra={"doc": ["x", "y"]})
    message = reject(id_col="image", target_col="label", group_col="page")
    assert str(tmp_path / "train.csv") in message
    for stated in ("data.id_col = 'image'", "data.target_col = 'label'", "data.group_col = 'page'"):
        assert stated in message
    assert "it has: 'ID', 'target', 'doc'" in message


def test_column_names_are_configurable(make_data: MakeData, read: Read, tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"], extra={"doc": ["x", "y"]})
    table = tmp_path / "train.csv"
    table.write_text(table.read_text().replace("ID,target", "image,label"))
    manifest = read(id_col="image", target_col="label", group_col="doc")
    assert manifest.groups is not None
    assert [*manifest.ids, *manifest.targets_N, *manifest.groups] == ["a", "b", 0, 1, "x", "y"]


def test_empty_group_is_reported_by_line(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data(["a", "b"], ["0", "1"], extra={"doc": ["x", " "]})
    message = reject(group_col="doc")
    assert "rows with an empty 'doc': 1" in message and "line 3: ID 'b'" in message


def test_table_without_rows_is_rejected(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data([], [])
    assert "no rows" in reject()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"ID,target\n\xe9,0\n", b'ID,target\n"a,0\n'])
def test_invalid_csv_error_names_key_and_path(
    make_data: MakeData, reject: Callable[..., str], tmp_path: Path, content: bytes
) -> None:
    make_data(["a", "b"], ["0", "1"])
    (tmp_path / "train.csv").write_bytes(content)
    message = reject()
    assert str(tmp_path / "train.csv") in message and "data.train_csv" in message


def test_short_row_does_not_shift_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ID,target\na\nb,1\n")
    table = read_table(tmp_path / "t.csv", "data.train_csv")
    assert list(table["ID"]) == ["a", "b"]
    assert not str(table["target"][0]).strip() or str(table["target"][0]) == "nan"


def test_rows_with_more_cells_than_columns_are_rejected_not_truncated(
    make_data: MakeData, reject: Callable[..., str], tmp_path: Path
) -> None:
    """An ID with an unquoted comma: truncated to the header's columns, `a` would be the ID and `b` the label."""
    make_data(["a", "c"], ["0", "1"])
    (tmp_path / "train.csv").write_text("ID,target\na,b,0\nc,d,1\n")
    assert "data.train_csv" in reject()


def test_short_row_is_an_empty_target(make_data: MakeData, reject: Callable[..., str], tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"])
    (tmp_path / "train.csv").write_text("ID,target\na\nb,1\n")
    assert "rows without a 'target' (empty, nan, na, n/a, none, null): 1" in reject()


def test_quoted_ids_and_carriage_returns_are_read(make_data: MakeData, read: Read, tmp_path: Path) -> None:
    make_data(["a,b", "c"], ["0", "1"])
    (tmp_path / "train.csv").write_bytes(b'ID,target\r\n"a,b",0\r\nc,1\r\n')
    assert tuple(read().ids) == ("a,b", "c") and read().classes == ("0", "1")


def test_missing_path_error_names_key_absolute_path_and_rule(make_config: MakeConfig, tmp_path: Path) -> None:
    data = make_config().data
    with pytest.raises(UserError) as caught:
        read_manifest(data)
    message = str(caught.value)
    assert f"data.train_csv: no such file: {tmp_path / 'train.csv'}" in message
    assert f"data.image_dir_train: no such folder: {tmp_path / 'train'}" in message
    assert "paths in a config are relative to the config file" in message


def test_wrong_kind_of_path_and_unset_path_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        check_paths({"a": (tmp_path, "file"), "b": (tmp_path / "file", "folder"), "c": (None, "file")})
    message = str(caught.value)
    assert f"a: not a file: {tmp_path}" in message
    assert f"b: not a folder: {tmp_path / 'file'}" in message
    assert "c: not set" in message
    check_paths({"a": (tmp_path, "folder"), "b": (tmp_path / "file", "file")})


def test_one_error_lists_all_problems_of_the_data(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data(["a", "a.jpg", "../x", "gone", "d"], ["1", "01", "1", "", "1"], files=["a.jpg", "d.jpg"])
    message = reject(on_duplicate="error")
    for text in (
        "rows without a",
        "spelled differently",
        "leave the image folder",
        "images missing",
        "more than one row",
    ):
        assert text in message

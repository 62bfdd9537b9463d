"""The manifest of train.csv and its images: valid IDs, and the problems that are reported before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from doccls.config import Config
from doccls.data.image_names import list_candidates
from doccls.data.manifest import Manifest, read_manifest
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


def test_folder_is_not_an_image(make_data: MakeData, reject: Callable[..., str], tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"], files=["b.jpg"])
    (tmp_path / "train" / "a.jpg").mkdir()
    assert "images missing" in reject()


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
    endings = (candidate.removeprefix("id0") for candidate in list_candidates("id0", ".jpg"))
    assert line.endswith(f"tried {tmp_path / 'train' / 'id0'}{{{','.join(endings)}}}")
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


def test_data_digest_depends_on_rule_that_makes_pixels(
    make_data: MakeData, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(["a", "b", "c", "d"], ["0", "1", "0", "1"])
    digest = prepare_data(make_config(data={"folds": 2})).digest
    monkeypatch.setattr("doccls.data.prepare.PIXEL_RULE", 99)
    assert prepare_data(make_config(data={"folds": 2})).digest != digest


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


def test_fold_column_that_splits_duplicates_is_refused_or_kept_with_a_warning(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path
) -> None:
    make_data([f"i{n}" for n in range(6)], ["0", "1"] * 3, extra={"fold": ["0.0", "1.0"] * 3})
    copy_page(tmp_path, "i2.jpg", "i3.jpg")
    with pytest.raises(UserError, match=r"lines 4 and 5: .*, folds \[0, 1\]\n.*data.on_duplicate: allow keeps it"):
        prepare_data(make_config(data={"folds": 2}))
    prepared = prepare_data(make_config(data={"folds": 2, "on_duplicate": "allow"}))
    assert prepared.assignment.fold_of_N.tolist() == [0, 1] * 3 and prepared.assignment.split == {2, 3}
    assert "(kept in the folds of the `fold` column; data.on_duplicate: keep | error | allow)" in prepared.warnings[0]
    assert prepared.warnings[1] == (
        "rows validated by a model that trained on their image (data.on_duplicate: allow): 2\n"
        "    line 4: ID 'i2'\n    line 5: ID 'i3'"
    )


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


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        ({"group_col": "doc"}, "data.group_col = 'doc' assigns no folds, since the CSV's column `fold` does"),
        ({"stratify": False}, "data.stratify = false has no effect, since the CSV's column `fold` assigns folds"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("has_fold", [True, False])
def test_keys_of_folds_are_reported_beside_fold_column(
    make_data: MakeData, make_config: MakeConfig, keys: dict[str, Any], idle: str | None, has_fold: bool
) -> None:
    extra = {"doc": list("abcdefgh")} | ({"fold": list("00001111")} if has_fold else {})
    make_data(list("abcdefgh"), ["0", "1"] * 4, extra=extra)
    warnings = prepare_data(make_config(data={"folds": 2, **keys})).warnings
    found = [line for line in warnings if "column `fold`" in line]
    assert len(found) == (has_fold and idle is not None)
    assert all(line.startswith(str(idle)) for line in found)


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


@pytest.mark.parametrize("empty", [
    "", "  ", "NaN", "nan", "NA", "n/a", "None", "null", "<NA>", "#N/A", "#REF!", "#VALUE!", "#DIV/0!", "-nan", "-NaN",
    "1.#QNAN", "-1.#IND00", "1,#QNAN0", "nan(ind)", "-nan(0x8000)", "NaT", "#WERT!", "#NOM?", "#¡REF!", "#####",
    "Err:502", "#Н/Д", "\u2800", "\u3164\ufe0f", "\\N", "(null)", "\u200b", "\xa0",
])  # fmt: skip
def test_empty_targets_are_reported_by_line(make_data: MakeData, reject: Callable[..., str], empty: str) -> None:
    make_data(["a", "b", "c", "d"], ["0", empty, "1", empty])
    message = reject()
    assert "rows without a 'target' (data.missing_labels lists the texts that count as missing): 2" in message
    assert f"line 3: ID 'b': {empty.strip()!r}" in message and "line 5: ID 'd'" in message


def test_targets_are_indices_into_classes(make_data: MakeData, read: Read) -> None:
    make_data(["a", "b", "c", "d"], ["10", "9", " 9 ", "10"])
    manifest = read()
    assert manifest.classes == ("9", "10")
    assert manifest.targets_N.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "labels", [["1", "01"], ["1", "1.0"], ["2", "3", "03"], ["0", "-0"], ["10.", "10"], [".5", "0.50"]]
)
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


@pytest.mark.parametrize("name", ["none", "NA", "#N/A", "null"])
def test_class_may_have_the_name_of_a_missing_label_that_is_not_listed(
    make_data: MakeData, read: Read, reject: Callable[..., str], name: str
) -> None:
    make_data(["a", "b", "c"], [name, "letter", "letter"])
    assert set(read(missing_labels=["?", ""]).classes) == {name, "letter"}
    assert "line 3: ID 'b': 'letter'" in reject(missing_labels=["Letter"])


def test_one_number_in_two_classes_beside_text_gives_a_warning(make_data: MakeData, read: Read) -> None:
    make_data([f"i{row}" for row in range(6)], ["1", "1.0", "other"] * 2)
    assert read().warnings == ("classes that are the same number, spelled differently: 1\n    '1', '1.0'",)


def test_groups_that_read_like_missing_values_give_a_warning(make_data: MakeData, read: Read) -> None:
    make_data(["a", "b", "c", "d"], ["0", "1"] * 2, extra={"doc": ["x", "NULL", "y", "#N/A"]})
    (warning,) = read(group_col="doc").warnings
    assert "one group of them: 2\n    line 3: ID 'b': 'NULL'\n    line 5: ID 'd': '#N/A'" in warning
    assert read(group_col="doc", missing_labels=[]).warnings == ()


@pytest.mark.parametrize("labels", [("caf\xe9", "cafe\u0301"), ("\u0410", "A"), ("a\u200b", "a"), ("x\u2013y", "x-y")])
def test_labels_that_look_the_same_are_rejected(
    make_data: MakeData, reject: Callable[..., str], labels: tuple[str, str]
) -> None:
    make_data(["a", "b", "c"], [*labels, "other"])
    message = reject()
    assert "look the same but differ in characters" in message and all(ascii(label) in message for label in labels)


def test_lines_are_those_of_the_file(make_data: MakeData, read: Read, tmp_path: Path) -> None:
    make_data(["a", "b", "c"], ["0", "1", "1"])
    (tmp_path / "train.csv").write_text('\nID,note,target\n\na,"one\ntwo",0\n\n\nb,x,1\nb,x,1\n')
    manifest = read()
    assert manifest.lines_N.tolist() == [4, 8, 9]
    assert manifest.describe(1) == "line 8: ID 'b'" and manifest.format_lines([0, 2]) == "4 and 9"
    assert "quoted cells with line breaks: 1\n    line 4 (to line 5): column 'note'" in manifest.warnings[0]
    assert "lines 8 and 9: ID 'b'" in manifest.warnings[1]


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
    assert "lines 2 and 3 and 4: ID 'a', labels differ: ['0', '1']" in warning
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
    assert "its first line, the header, has: 'ID', 'target', 'doc'" in message


def test_column_names_are_configurable(make_data: MakeData, read: Read, tmp_path: Path) -> None:
    make_data(["a", "b"], ["0", "1"], extra={"doc": ["x", "y"]})
    table = tmp_path / "train.csv"
    table.write_text(table.read_text().replace("ID,target", "image,label"))
    manifest = read(id_col="image", target_col="label", group_col="doc")
    assert manifest.groups is not None
    assert [*manifest.ids, *manifest.targets_N, *manifest.groups] == ["a", "b", 0, 1, "x", "y"]


@pytest.mark.parametrize("name", ["Fold", " fold", "FOLDS"])
def test_column_nearly_named_fold_gives_a_warning(make_data: MakeData, read: Read, name: str) -> None:
    make_data(["a", "b"] * 2, ["0", "1"] * 2, extra={name: ["0", "1"] * 2})
    manifest = read()
    assert manifest.folds is None
    assert f"columns {name!r} don't assign the folds: the name must be `fold`" in manifest.warnings


def test_empty_group_is_reported_by_line(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data(["a", "b"], ["0", "1"], extra={"doc": ["x", " "]})
    message = reject(group_col="doc")
    assert "rows with an empty 'doc': 1" in message and "line 3: ID 'b'" in message


def test_table_without_rows_is_rejected(make_data: MakeData, reject: Callable[..., str]) -> None:
    make_data([], [])
    assert "no rows" in reject()


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

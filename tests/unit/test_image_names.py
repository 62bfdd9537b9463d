"""The image file of each ID: candidates, names in other case or Unicode normalization, and IDs that are refused."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from doccls.config.schema import IMAGE_EXTENSIONS
from doccls.data.image_names import list_candidates, resolve_images


@pytest.mark.parametrize("sample_id", ["x.jpg", "x.JPG", "x.jpeg", "x.Png", "sub/x.tif", "x.y.webp", "x.jpg.jpg"])
def test_id_with_known_extension_is_the_only_candidate(sample_id: str) -> None:
    assert list_candidates(sample_id, ".jpg") == (sample_id,)


@pytest.mark.parametrize("sample_id", ["x", "x.y", "v1.2", "x.pdf", "x.", ".x"])
def test_id_without_known_extension_gets_each_extension_once(sample_id: str) -> None:
    candidates = list_candidates(sample_id, ".png")
    assert candidates[0] == f"{sample_id}.png"
    assert len(set(candidates)) == len(candidates) == len(IMAGE_EXTENSIONS)
    assert all(name.startswith(f"{sample_id}.") for name in candidates)


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
    monkeypatch.setattr("doccls.config.paths.os.scandir", lambda folder: listed.append(folder) or iter(()))
    images = resolve_images([sample_id], [2], tmp_path / "train", ".jpg")
    assert images.names == (None,) and not images.missing and not listed
    assert images.refused is not None
    assert "leave the image folder" in images.refused and f"line 2: ID {sample_id!r}" in images.refused


KOREAN, FRENCH = "영수증/영수증_01", "reçu/reçu_01"


@pytest.mark.parametrize("sample_id", [KOREAN, FRENCH])
@pytest.mark.parametrize(("stated", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC"), ("NFD", "NFD")])
def test_name_in_other_unicode_normalization_is_found(tmp_path: Path, sample_id: str, stated: str, stored: str) -> None:
    file = unicodedata.normalize(stored, f"{sample_id}.png")
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).touch()
    images = resolve_images([unicodedata.normalize(stated, sample_id)], [2], tmp_path, ".jpg")
    assert images.names == (file,) and (tmp_path / file).is_file()


def test_exact_name_wins_over_composed_name_over_other_case(tmp_path: Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")
    for name in (composed, decomposed, composed.upper()):
        (tmp_path / name).touch()
    found = resolve_images([composed, decomposed, composed.upper()], [2, 3, 4], tmp_path, ".jpg").names
    assert found == (composed, decomposed, composed.upper())
    (tmp_path / decomposed).unlink()
    assert resolve_images([decomposed], [2], tmp_path, ".jpg").names == (composed,)
    (tmp_path / composed).unlink()
    assert resolve_images([decomposed], [2], tmp_path, ".jpg").names == (composed.upper(),)


@pytest.mark.parametrize("file", ["IMG_1.heic", "IMG_1.heic.jpg", "IMG_1.HEIC.PNG"])
def test_name_with_rare_extension_may_have_another_one(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    assert resolve_images(["IMG_1.heic"], [2], tmp_path, ".png").names == (file,)


def test_folder_in_other_case_is_found(tmp_path: Path) -> None:
    (tmp_path / "Scans" / "Deep").mkdir(parents=True)
    (tmp_path / "Scans" / "Deep" / "X.PNG").touch()
    assert resolve_images(["scans/DEEP/x"], [2], tmp_path, ".jpg").names == ("Scans/Deep/X.PNG",)


def test_files_that_no_row_names_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))).touch()
    (tmp_path / "line\nbreak.jpg").touch()
    assert resolve_images(["a"], [2], tmp_path, ".jpg").names == ("a.jpg",)


@pytest.mark.parametrize("path", ["a.jpg", "sub/a.jpg", "sub/deep/a.jpg"])
def test_file_in_folder_that_cannot_be_listed_is_left_to_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("doccls.data.image_names.list_entries", refuse)
    assert resolve_images([path], [2], tmp_path, ".jpg").names == (path,)


def test_each_row_is_reported_even_if_its_id_repeats(tmp_path: Path) -> None:
    images = resolve_images(["x.jpg", "x.jpg", "../y", "../y"], [2, 5, 6, 9], tmp_path, ".jpg")
    tried = f"tried {tmp_path / 'x.jpg'}"
    assert images.missing == (f"line 2: ID 'x.jpg': {tried}", f"line 5: ID 'x.jpg': {tried}")
    assert images.refused is not None and "line 6: ID '../y'\n    line 9: ID '../y'" in images.refused

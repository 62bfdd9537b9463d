"""The scan of image files: facts in order, and a bounded number of files in memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doccls.data import formats, image_scan
from doccls.data.image_scan import scan_files
from doccls.data.images import decode_image, scale_page

LIMIT = 10**8


def make_noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_scan_returns_digests_and_problems_in_order(tmp_path: Path) -> None:
    good, text, gone, folder = (tmp_path / name for name in ("good.png", "text.jpg", "gone.jpg", "folder.jpg"))
    good.write_bytes(make_noise())
    text.write_text("not an image")
    folder.mkdir()
    scanned = list(scan_files([text, good, gone, folder, good], LIMIT, 20, {}, keep_pages=True))
    facts = [image.fact for image in scanned]
    assert [image.scaled is not None for image in scanned] == [fact.problem is None for fact in facts]
    assert np.array_equal(scanned[1].scaled, scale_page(decode_image(good.read_bytes(), LIMIT), 20))
    assert [fact.problem is None for fact in facts] == [False, True, False, False, True]
    assert facts[1] == facts[4] and len(facts[1].digest) == 64
    assert facts[0].problem is not None and "not an image" in facts[0].problem and facts[0].digest
    assert facts[2].problem is not None and "can't be read" in facts[2].problem and facts[2].digest == ""
    assert facts[3].problem is not None and "can't be read" in facts[3].problem
    stat = good.stat()
    assert (scanned[1].scan.size_bytes, scanned[1].scan.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_image_above_the_pixel_limit_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_noise())
    (fact,) = (image.fact for image in scan_files([tmp_path / "a.png"], 100, 20, {}, keep_pages=False))
    assert fact.problem is not None and "max_image_pixels" in fact.problem


def test_scan_that_an_extra_would_change_has_no_digest_and_so_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_register_heif", lambda: False)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (image,) = scan_files([tmp_path / "a.jpg"], LIMIT, 20, {}, keep_pages=False)
    assert image.fact.problem is not None and "doccls[heic]" in image.fact.problem and image.fact.digest == ""


def test_number_of_files_scanned_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_scan, "count_cores", lambda: 2)
    started: list[Path] = []
    monkeypatch.setattr(image_scan, "_scan", lambda path, *others: started.append(path) or path)
    paths = [tmp_path / str(number) for number in range(30)]
    scanned = scan_files(paths, LIMIT, 20, {}, keep_pages=True)
    for number, path in enumerate(paths):
        assert next(scanned) == path and number < len(started) <= min(30, number + 1 + 2 * image_scan._AHEAD)
    assert list(scanned) == [] and sorted(started) == sorted(paths)


def test_closing_the_iterator_stops_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(image_scan, "_scan", lambda path, *others: started.append(path))
    scanned = scan_files([tmp_path] * 1000, LIMIT, 20, {}, keep_pages=True)
    next(scanned)
    scanned.close()
    assert len(started) < 1000

"""The scan of image files: what it tells of each, in their order, and no more files at once than memory may hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doccls.data import image_scan as room
from doccls.data.image_scan import scan_files
from doccls.data.images import decode_image, scale_page

LIMIT = 10**8


def make_noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_the_scan_tells_each_files_digest_and_problem_in_order(tmp_path: Path) -> None:
    good, text, gone, folder = (tmp_path / name for name in ("good.png", "text.jpg", "gone.jpg", "folder.jpg"))
    good.write_bytes(make_noise())
    text.write_text("not an image")
    folder.mkdir()
    seen = list(scan_files([text, good, gone, folder, good], LIMIT, 20, {}, keep_pages=True))
    facts = [one.fact for one in seen]
    assert [one.scaled is not None for one in seen] == [fact.problem is None for fact in facts]
    assert np.array_equal(seen[1].scaled, scale_page(decode_image(good.read_bytes(), LIMIT), 20))
    assert [fact.problem is None for fact in facts] == [False, True, False, False, True]
    assert facts[1] == facts[4] and len(facts[1].digest) == 64
    assert facts[0].problem is not None and "not an image" in facts[0].problem and facts[0].digest
    assert facts[2].problem is not None and "can't be read" in facts[2].problem and facts[2].digest == ""
    assert facts[3].problem is not None and "can't be read" in facts[3].problem
    found = good.stat()
    assert (seen[1].scan.size_bytes, seen[1].scan.mtime_ns) == (found.st_size, found.st_mtime_ns)


def test_the_scan_refuses_above_the_pixel_limit(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_noise())
    (fact,) = (one.fact for one in scan_files([tmp_path / "a.png"], 100, 20, {}, keep_pages=False))
    assert fact.problem is not None and "max_image_pixels" in fact.problem


def test_so_many_are_scanned_ahead_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "count_cores", lambda: 2)
    begun: list[Path] = []
    monkeypatch.setattr(room, "_scan", lambda path, *others: begun.append(path) or path)
    paths = [tmp_path / str(number) for number in range(30)]
    scanned = scan_files(paths, LIMIT, 20, {}, keep_pages=True)
    for number, path in enumerate(paths):
        assert next(scanned) == path and number < len(begun) <= min(30, number + 1 + 2 * room._AHEAD)
    assert list(scanned) == [] and sorted(begun) == sorted(paths)


def test_whoever_stops_asking_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []
    monkeypatch.setattr(room, "_scan", lambda path, *others: begun.append(path))
    scanned = scan_files([tmp_path] * 1000, LIMIT, 20, {}, keep_pages=True)
    next(scanned)
    scanned.close()
    assert len(begun) < 1000

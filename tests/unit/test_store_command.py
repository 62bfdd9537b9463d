"""`doccls store`: what it tells of a store, what it removes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.__main__ import main
from doccls.data.prepare import prepare_data
from doccls.data.store import PageStore, choose_store
from doccls.system.lock import hold_lock
from tests.unit.conftest import MakeConfig, MakeData

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """`doccls store WORDS`: exit code, stdout, stderr."""

    def act(*words: object) -> tuple[int, str, str]:
        code = main(["store", *map(str, words)])
        return code, *capsys.readouterr()

    return act


@pytest.fixture
def folder(make_config: MakeConfig, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of twelve pages in two sizes, and of two decoders."""
    make_data([f"i{number}" for number in range(12)], ["0", "1"] * 6)
    folder = tmp_path / "store"
    for size, version in ((32, None), (48, None), (32, "1.0")):
        with monkeypatch.context() as patch:
            if version is not None:
                patch.setattr("PIL.__version__", version)
            config = make_config(data={"folds": 2, "store": str(folder)}, train={"img_size": size})
            prepare_data(config, None, choose_store(config))
    return folder


def list_segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("pages_*"))


def test_info_tells_sizes_pages_bytes_and_makers(folder: Path, say: Say) -> None:
    assert len(list_segments(folder)) == 3
    code, out, _ = say("info", folder)
    total, old, new, large = out.splitlines()
    assert code == 0 and total.startswith(f"{folder}: 36 pages, 0.")
    assert old.startswith("  32 px: 12 pages, 0.") and "made by Pillow 1.0, OpenCV" in old
    assert old.endswith("not used by these versions (doccls store clear --unused)")
    assert "32 px: 12 pages" in new and "48 px: 12 pages" in large and "not used" not in new + large


def test_info_tells_of_damage(folder: Path, say: Say) -> None:
    list_segments(folder)[-1].write_bytes(b"torn")
    assert say("info", folder)[1].splitlines()[-1].endswith("1 damaged files are passed over")


def test_clear_removes_the_pages_and_no_other_file(folder: Path, say: Say) -> None:
    others = [folder / "notes.txt", folder / "px32-mine" / "a.txt", PageStore(folder, 48).folder / "mine.csv"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    code, out, _ = say("clear", folder)
    assert code == 0 and len(out.splitlines()) == 3 and all(line.startswith("removed ") for line in out.splitlines())
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(others)
    assert say("info", folder)[1].startswith(f"{folder}: 0 pages")
    assert say("clear", folder / "nowhere")[1] == f"{folder / 'nowhere'}: nothing to remove\n"


def test_clear_leaves_no_folder_of_its_own(folder: Path, say: Say) -> None:
    assert len(list(folder.rglob("scans_*.json"))) == 3
    (PageStore(folder, 48).folder / "images.json").write_text("of an earlier version")
    assert say("clear", folder)[0] == 0 and not folder.exists()
    assert say("info", folder) == (0, f"{folder}: no decoded pages\n", "")


def test_clear_unused_keeps_what_these_versions_use(folder: Path, say: Say) -> None:
    used = [PageStore(folder, size).folder for size in (32, 48)]
    assert say("clear", "--unused", folder)[0] == 0
    assert sorted(one.parent for one in list_segments(folder)) == sorted(used)
    assert say("clear", "--unused", folder)[1] == f"{folder}: nothing to remove\n"


def test_pages_that_are_being_decoded_are_not_removed(folder: Path, say: Say) -> None:
    segments = list_segments(folder)
    with hold_lock(PageStore(folder, 32).lock, "pages are being decoded"):
        code, _, error = say("clear", folder)
    assert code == 1 and "pages are being decoded by process" in error
    left = list_segments(folder)
    assert [one for one in segments if one.parent == PageStore(folder, 32).folder] == [
        one for one in left if one.parent == PageStore(folder, 32).folder
    ]
    assert say("clear", folder)[0] == 0


def test_a_store_is_named_once(tmp_path: Path, folder: Path, say: Say) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("data:\n  train_csv: train.csv\n  image_dir_train: train\n")
    for words in (("info",), ("clear",), ("info", folder, "--config", config)):
        code, out, error = say(*words)
        assert (code, out) == (1, "") and "say which store: its FOLDER, or --config FILE" in error
    assert say("info", "--config", config, "--set", f"data.store={folder}") == say("info", folder)
    assert "data.store is off" in say("info", "--config", config, "--set", "data.store=off")[2]

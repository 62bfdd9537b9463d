"""`doccls store`: what it reports of a store, what it removes, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.__main__ import main
from doccls.data.prepare import prepare_data
from doccls.data.store import PageStore, choose_store
from doccls.system.lock import hold_lock
from tests.unit.conftest import MakeConfig, MakeData

RunStore = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_store(capsys: pytest.CaptureFixture[str]) -> RunStore:
    """A function that runs `doccls store ARGS` and returns exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main(["store", *map(str, args)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(make_config: MakeConfig, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of twelve pages in two sizes and from two decoder versions."""
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


def test_info_lists_sizes_pages_bytes_and_versions(folder: Path, run_store: RunStore) -> None:
    assert len(list_segments(folder)) == 3
    code, out, _ = run_store("info", folder)
    total, old, new, large = out.splitlines()
    assert code == 0 and total.startswith(f"{folder}: 36 pages, 0.")
    assert old.startswith("  32 px: 12 pages, 0.") and "made by Pillow 1.0, OpenCV" in old
    assert old.endswith("not used by the installed versions (doccls store clear --unused)")
    assert "32 px: 12 pages" in new and "48 px: 12 pages" in large and "not used" not in new + large


def test_info_reports_damage(folder: Path, run_store: RunStore) -> None:
    list_segments(folder)[-1].write_bytes(b"torn")
    assert run_store("info", folder)[1].splitlines()[-1].endswith("1 damaged files are skipped")


def test_clear_removes_pages_but_no_other_file(folder: Path, run_store: RunStore) -> None:
    others = [folder / "notes.txt", folder / "px32-mine" / "a.txt", PageStore(folder, 48).folder / "mine.csv"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    code, out, _ = run_store("clear", folder)
    assert code == 0 and len(out.splitlines()) == 3 and all(line.startswith("removed ") for line in out.splitlines())
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(others)
    assert run_store("info", folder)[1].startswith(f"{folder}: 0 pages")
    assert run_store("clear", folder / "nowhere")[1] == f"{folder / 'nowhere'}: nothing to remove\n"


def test_clear_removes_its_own_folders(folder: Path, run_store: RunStore) -> None:
    assert len(list(folder.rglob("scans_*.json"))) == 3
    (PageStore(folder, 48).folder / "images.json").write_text("of an earlier version")
    assert run_store("clear", folder)[0] == 0 and not folder.exists()
    assert run_store("info", folder) == (0, f"{folder}: no decoded pages\n", "")


def test_clear_unused_keeps_pages_of_installed_versions(folder: Path, run_store: RunStore) -> None:
    used = [PageStore(folder, size).folder for size in (32, 48)]
    assert run_store("clear", "--unused", folder)[0] == 0
    assert sorted(path.parent for path in list_segments(folder)) == sorted(used)
    assert run_store("clear", "--unused", folder)[1] == f"{folder}: nothing to remove\n"


def test_pages_being_decoded_are_not_removed(folder: Path, run_store: RunStore) -> None:
    segments = list_segments(folder)
    with hold_lock(PageStore(folder, 32).lock, "pages are being decoded"):
        code, _, error = run_store("clear", folder)
    assert code == 1 and "pages are being decoded by process" in error
    remaining = list_segments(folder)
    assert [path for path in segments if path.parent == PageStore(folder, 32).folder] == [
        path for path in remaining if path.parent == PageStore(folder, 32).folder
    ]
    assert run_store("clear", folder)[0] == 0


def test_store_is_named_by_either_folder_or_config(tmp_path: Path, folder: Path, run_store: RunStore) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("data:\n  train_csv: train.csv\n  image_dir_train: train\n")
    for args in (("info",), ("clear",), ("info", folder, "--config", config)):
        code, out, error = run_store(*args)
        assert (code, out) == (1, "") and "give either the store's FOLDER or --config FILE" in error
    assert run_store("info", "--config", config, "--set", f"data.store={folder}") == run_store("info", folder)
    assert "data.store is off" in run_store("info", "--config", config, "--set", "data.store=off")[2]

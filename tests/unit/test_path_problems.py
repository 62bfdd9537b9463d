"""Every problem with a path is reported in words, with its key or option and the path, by every command."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from doccls import train
from doccls.__main__ import main as doccls
from launcher.cli import main as launcher

MakeData = Callable[..., Path]
INPUTS = {"data.train_csv": "file", "data.image_dir_train": "folder", "data.sample_csv": "file",
          "data.image_dir_test": "folder", "model.weights": "file"}  # fmt: skip
OUTPUTS = ("output.logs_dir", "output.exp_dir", "data.store")
# Each entry that `make_problems` makes, and what is said of it as a file, as a folder and as a folder to write into.
PROBLEMS: dict[str, tuple[str | None, str | None, str | None]] = {
    "gone": ("no such file", "no such folder", None),
    "file": (None, "it is a file", "it is a file"),
    "file/x": ("is a file", "is a file", "is a file"),
    "folder": ("it is a folder", None, None),
    "loop": ("a loop of symbolic links", "a loop of symbolic links", "a loop of symbolic links"),
    "loop/x": ("a loop of symbolic links", "a loop of symbolic links", "a loop of symbolic links"),
    "broken": ("is a link to nowhere", "is a link to nowhere", None),  # mkdir creates its target
    "fifo": ("it is a FIFO", "it is a FIFO", "it is a FIFO"),
    "socket": ("it is a socket", "it is a socket", "it is a socket"),
    "/dev/zero": ("it is a device", "it is a device", "it is a device"),
    "y" * 256: ("at most 255", "at most 255", "at most 255"),
    "y/" * 2100 + "z": ("at most 4095", "at most 4095", "4095 bytes"),
    "$UNSET_4711/x": ("UNSET_4711 is not set", "UNSET_4711 is not set", "UNSET_4711 is not set"),
    "~nosuchuser4711/x": ("the home folder ~nosuchuser4711",) * 3,
    "a\0b": ("NUL",) * 3,
    "\udcff": ("not valid UTF-8",) * 3,
}
COMMANDS: dict[str, Callable[[Path], int]] = {
    "train": lambda config: train.main(["--config", str(config)]),
    "check": lambda config: doccls(["check", "--config", str(config)]),
    "plan": lambda config: launcher(["plan", "--config", str(config), "--slots", "1"]),
}
NAMES = {name: name[:9].replace("\0", "NUL").replace("\udcff", "BYTE") for name in PROBLEMS}
OPTIONS = [name for name in PROBLEMS if not name.startswith("$")]  # the shell expands variables of options


@pytest.fixture
def data(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a usable data set and an entry of each kind."""
    folder = make_data([f"i{row}" for row in range(6)], ["0", "1"] * 3)
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop")
    (folder / "broken").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return folder


def write_config(folder: Path, **values: str) -> Path:
    """Write a config of tiny folds; `data__train_csv="x"` sets a key."""
    keys = {"data.train_csv": "train.csv", "data.image_dir_train": "train", "data.folds": 2,
            "data.num_workers": 0, "model.name": "test_resnet", "model.pretrained": False,
            "train.img_size": 32, "train.batch_size": 2, "train.epochs": 1, "train.warmup_epochs": 0}  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in values.items()}
    sections: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    path = folder / "c.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML, and escapes every character
    return path


def check_message(code: int, captured: tuple[str, str], *parts: str) -> None:
    output = "".join(captured)
    assert code == 1, output
    assert "Traceback" not in output
    for part in parts:
        assert part in output


@pytest.mark.parametrize("name", PROBLEMS, ids=NAMES.get)
def test_all_keys_are_reported_with_their_path(data: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    as_file, as_folder, as_output = PROBLEMS[name]
    reasons = {key: as_file if kind == "file" else as_folder for key, kind in INPUTS.items()}
    reasons |= dict.fromkeys(OUTPUTS, as_output)
    said = {key: reason for key, reason in reasons.items() if reason is not None}
    config = write_config(data, **{key.replace(".", "__"): name for key in said})
    for command, run in COMMANDS.items():
        code, captured = run(config), capsys.readouterr()
        if name == "gone" and command == "plan":  # which may be made on a machine without the data
            assert code == 0 and all(f"[WARNING] {key}: {reason}: {data / name}" in captured.out
                                     for key, reason in said.items())  # fmt: skip
            continue
        if command != "train" and not captured.err.startswith(f"doccls {command}: config"):
            said = {key: reason for key, reason in said.items() if key not in OUTPUTS}
        assert code == 1 and "Traceback" not in captured.out + captured.err
        lines = captured.err.splitlines()
        for key, reason in said.items():
            line = next(line for line in lines if key in line)
            assert reason in line
            assert str(data / name) in line or repr(name) in line


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "file"], ids=lambda name: NAMES[name])
def test_config_that_can_not_be_read_is_reported_with_its_option(
    data: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for command in COMMANDS.values():
        check_message(command(Path(name)), capsys.readouterr(), "--config", repr(name)[1:-1][:9])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in ("status", "cancel", "merge", "predict", "store")
        for name in OPTIONS
        if name != "folder" and (command != "store" or name not in ("gone", "broken"))  # an empty store
    ],
    ids=lambda value: NAMES.get(value, value),
)
def test_folder_that_can_not_be_listed_is_reported_with_its_argument(
    data: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    if command in ("status", "cancel", "merge"):
        code = launcher([command, name])
    else:
        code = doccls(["predict", name] if command == "predict" else ["store", "info", name])
    check_message(code, capsys.readouterr(), "FOLDER" if command == "store" else "RUN", repr(name)[1:-1][:9])


# --- entries that no row names ---------------------------------------------------------------------------------------


def make_strangers(folder: Path, *names: str) -> None:
    """Make entries of every kind that nothing names, and empty files with these names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loop").symlink_to("loop")
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "subfolder").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    for name in (os.fsdecode(b"\xff.jpg"), "line\nbreak.jpg", *names):
        (folder / name).write_text("strange")


def test_entries_of_image_folder_and_store_that_no_row_names_do_not_matter(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(data)
    assert COMMANDS["check"](config) == 0
    pages = next((data / "page_store").iterdir())
    for folder in (data / "train", data / "page_store", pages):
        make_strangers(folder, "I0.JPG.txt")
    os.mkfifo(pages / "pages_x.safetensors")
    (pages / "pages_y.safetensors").symlink_to("pages_y.safetensors")
    (pages / "pages_z.safetensors").mkdir()
    capsys.readouterr()
    assert COMMANDS["check"](config) == 0
    assert "6 rows, 2 classes" in capsys.readouterr().out
    assert doccls(["store", "info", str(data / "page_store")]) == 0
    assert "6 pages" in capsys.readouterr().out
    assert doccls(["store", "clear", str(data / "page_store")]) == 0
    assert list(pages.glob("pages_?????*.safetensors")) == []


def test_named_image_that_is_no_regular_file_is_bad_image(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, make in enumerate(
        (os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev/zero"))
    ):
        (data / "train" / f"i{row}.jpg").unlink()
        make(data / "train" / f"i{row}.jpg")
    with (data / "train.csv").open("a") as table:
        table.write("loop/x,1\n")
    (data / "train" / "loop").symlink_to("loop")
    check_message(
        COMMANDS["check"](write_config(data)), capsys.readouterr(), "images that can't be used: 4",
        "i0.jpg: can't be read: not a file: it is a FIFO", "i1.jpg: can't be read: Too many levels",
        "i2.jpg: can't be read: not a file: it is a device",
        "loop/x.jpg: can't be read: Too many levels",
    )  # fmt: skip
    with (data / "train.csv").open("a") as table:
        table.writelines(f"n{row},{row % 2}\n" for row in range(4))
    for row in range(4):
        (data / "train" / f"n{row}.jpg").write_bytes((data / "train" / f"i{3 + row % 2}.jpg").read_bytes())
    assert COMMANDS["check"](write_config(data, data__on_bad_image="skip")) == 0
    assert "4 rows are left out of training" in capsys.readouterr().out


def test_foreign_entries_of_run_folder_do_not_matter(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp_dir, strange = data / "experiments", ("20250101", "notes")
    make_strangers(exp_dir, *strange)
    (exp_dir / "2026x" / "v1").mkdir(parents=True)
    (exp_dir / "20250102").symlink_to("20250102")
    config = write_config(data)
    assert train.main(["--config", str(config), "--run-id", "v1"]) == 0
    run = next(path for path in exp_dir.glob("2*/v1") if path.parent.name != "2026x")
    for folder, names in {
        "": ("launch_backup.json", "launch.json.txt"),
        "ckpt": ("best_fold0 (copy).pth", "best_fold.pth", "best_foldx.pth"),
        "oof/parts": ("fold0 (copy).safetensors", "fold1_old.safetensors"),
        "metrics": ("fold0 (copy).jsonl",),
        "live": ("x_rank0.json", "launch_x.lock", "fold0_rankx.json"),
    }.items():
        make_strangers(run / folder, *names)
    os.mkfifo(run / "ckpt" / "best_fold7.pth")
    os.mkfifo(run / "oof" / "parts" / "fold7.safetensors")
    os.mkfifo(run / "metrics" / "fold7.jsonl")
    os.mkfifo(run / "live" / "fold7_rank0.json")
    os.mkfifo(run / "launch_task7.json")
    capsys.readouterr()
    assert launcher(["merge", str(run)]) == 0
    assert launcher(["status", str(run)]) == 0
    capsys.readouterr()
    assert train.main(["--config", str(config), "--run-id", "v1"]) == 0
    assert "finished before" in capsys.readouterr().out
    make_strangers(data / "test")
    (data / "sample.csv").write_text("ID,target\ni0,0\ni1,0\n")
    assert doccls(["predict", str(run), "--sample-csv", "sample.csv", "--image-dir", "train"]) == 0
    assert (run / "submission.csv").read_text().splitlines()[0] == "ID,target"


# --- variables -------------------------------------------------------------------------------------------------------


def test_snapshot_reads_back_to_same_paths_whatever_their_names(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doccls.config import load_config, parse_override, render_snapshot

    monkeypatch.setenv("DOCCLS_4711", "$UNSET_4711/x")  # a value is not expanded again
    (data / "a$b").mkdir()
    config = write_config(
        data, data__train_csv="a$b/t.csv", output__exp_dir="$DOCCLS_4711", data__store="${DOCCLS_4711}/s"
    )
    first = load_config(config)
    assert first.data.train_csv == data / "a$b" / "t.csv"
    assert first.output.exp_dir == data / "$UNSET_4711" / "x" and first.data.store == data / "$UNSET_4711/x/s"
    (data / "a$b").rmdir()
    snapshot = data / "snapshot.yaml"
    snapshot.write_text(render_snapshot(first, {"run_id": "x"}))
    again = load_config(snapshot, None, [parse_override("output.logs_dir=$HOME/logs")])
    assert (again.data, again.output.exp_dir) == (first.data, first.output.exp_dir)
    assert again.output.logs_dir == Path(os.path.realpath(Path.home())) / "logs"


def test_config_of_checkpoint_is_not_expanded(data: Path) -> None:
    from doccls.config import Config

    values = {"data": {"train_csv": "/gone/$UNSET_4711/t.csv", "image_dir_train": "/gone/${X}"}}
    assert Config.model_validate(values).data.train_csv == Path("/gone/$UNSET_4711/t.csv")


# --- permissions -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_missing_permission_is_reported_with_key_and_path(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(data)
    assert train.main(["--config", str(config), "--run-id", "v1"]) == 0
    run = next((data / "experiments").glob("*/v1"))
    for path in (data, *data.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o777)
    for path in data.parents:
        if "pytest" in str(path):
            path.chmod(0o755)
    every = tuple(partial(command, config) for command in COMMANDS.values())
    resume = partial(train.main, ["--config", str(config), "--run-id", "v1"])
    status, cancel, merge = (partial(launcher, [name, str(run)]) for name in ("status", "cancel", "merge"))
    capsys.readouterr()
    for key, path, mode, commands in (
        ("--config", config, 0, every),
        ("data.train_csv", data / "train.csv", 0, every),
        ("data.image_dir_train", data / "train", 0o711, every),
        ("data.image_dir_train", data / "train", 0o744, every),
        ("output.logs_dir", data / "logs", 0o555, every[:1]),
        ("output.exp_dir", run.parent, 0o555, every[:1]),
        ("output.exp_dir", run / "live", 0o555, (resume,)),
        ("output.exp_dir", run / "ckpt", 0o555, (resume,)),
        ("config.yaml", run / "config.yaml", 0, (resume,)),
        ("parts", run / "oof" / "parts", 0, (resume, status, merge)),
        ("RUN", run, 0, (status, cancel, merge)),
        ("live", run / "live", 0, (status, cancel)),
        ("ckpt", run / "ckpt", 0, (merge,)),
    ):
        for command in commands:
            path.chmod(mode)
            os.seteuid(65534)
            try:
                code = command()
            finally:
                os.seteuid(0)
                path.chmod(0o777)
            check_message(code, capsys.readouterr(), key, str(path))

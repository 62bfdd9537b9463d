"""The benchmark cases: contenders that do the same work, and the figures measured for each."""

import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Cost, run
from benchmarks.pages import link_for_timm
from doccls.config.load import load_config
from doccls.data.prepare import prepare_data

Figures = Mapping[str, float]
_EPOCH_RATE = re.compile(r"images_per_s=([\d.]+)")
TIMM_RATE = re.compile(r"\(\s*100%\)\].*\(\s*[\d.]+s,\s*([\d.]+)/s\)")
_DECODED = re.compile(r"of which (\d+) were decoded now")


@dataclass(frozen=True)
class Bench:
    """Input and output folders of a measurement."""

    folder: Path
    pages: Path  # A4 pages: train.csv, train/
    few: Path  # a few such pages
    timm: Path  # a checkout of timm's repository
    epochs: int


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work; ratios compare the first with each of the others."""

    name: str
    what: str
    contenders: Mapping[str, Callable[[Bench, int], Figures]]
    figures: tuple[str, ...]
    rounds: int  # maximum


def _train_ours(bench: Bench, name: str, sets: Sequence[str], pages: Path, keep: bool = False) -> Cost:
    folder = bench.folder / "runs" / name if keep else _make_folder(bench, name)
    config = _write_config(pages)
    outputs = (f"output.exp_dir={folder}/experiments", f"output.logs_dir={folder}/logs", f"data.store={folder}/store")
    overrides = (*outputs, "model.pretrained=false", f"train.epochs={bench.epochs}", *sets)
    options = [f"--set={override}" for override in overrides]
    command = [sys.executable, "-m", "doccls.train", "--config", str(config), "--run-id", "bench", *options]
    return run(command, Path.cwd(), {}, folder / "console.txt")


def _write_config(pages: Path) -> Path:
    config = pages / "bench.yaml"
    config.write_text("data:\n  train_csv: train.csv\n  image_dir_train: train\n")
    return config


def _train_timm(bench: Bench, name: str, options: Sequence[str], epochs: int, pages: Path) -> Cost:
    folder = _make_folder(bench, name)
    command = [
        sys.executable, "train.py", "--data-dir", str(_link_pages(pages)), "--num-classes", "12", "--batch-size", "32",
        "--epochs", str(epochs), "--device", "cpu", "--no-prefetcher", "--workers", "2", "--opt", "adamw",
        "--lr", "5e-4", "--weight-decay", "0.01", "--clip-grad", "5", "--warmup-epochs", "0",
        "--scale", "0.9", "1.0", "--ratio", "0.9", "1.1", "--hflip", "0", "--color-jitter", "0.15",
        "--train-interpolation", "bilinear", "--log-interval", "1000", "--output", str(folder), *options,
    ]  # fmt: skip
    return run(command, bench.timm, {"PYTHONPATH": str(bench.timm)}, folder / "console.txt")


def _make_folder(bench: Bench, name: str) -> Path:
    """Create an empty folder, so that a round uses nothing of an earlier one."""
    folder = bench.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _link_pages(pages: Path) -> Path:
    """Link the split of fold 0 as timm expects it."""
    if (pages / "timm").exists():
        return pages / "timm"
    data = prepare_data(load_config(_write_config(pages)))
    names = [[data.manifest.ids[row] for row in rows.tolist()] for rows in (data.list_train(0), data.list_valid(0))]
    return link_for_timm(pages, *names)


def _list_costs(cost: Cost) -> dict[str, float]:
    return {"CPU-s": cost.cpu_s, "wall s": cost.wall_s, "memory MiB": cost.memory_mib}


_TINY = ("model.name=test_efficientnet", "train.img_size=224")


def _one_fold(bench: Bench, number: int) -> Figures:
    cost = _train_ours(bench, "a4", (*_TINY, "data.valid_fold=0"), bench.pages)
    return {**_list_costs(cost), "decoded": _sum_decoded(cost)}


def _one_fold_with_store(bench: Bench, number: int) -> Figures:
    """Train the fold anew with the store that the round's first contender filled."""
    folder = bench.folder / "runs" / "a4"
    shutil.rmtree(folder / "experiments")
    cost = _train_ours(bench, "a4", (*_TINY, "data.valid_fold=0"), bench.pages, keep=True)
    return {**_list_costs(cost), "decoded": _sum_decoded(cost)}


def _one_timm(bench: Bench, number: int) -> Figures:
    options = ("--model", "test_efficientnet", "--img-size", "224")
    return _list_costs(_train_timm(bench, "a4-timm", options, bench.epochs, bench.pages))


def _five_folds(bench: Bench, number: int) -> Figures:
    cost = _train_ours(bench, "a4-folds", _TINY, bench.pages)
    return {**_list_costs(cost), "decoded": _sum_decoded(cost)}


def _five_timm(bench: Bench, number: int) -> Figures:
    costs = [_one_timm(bench, number) for _ in range(5)]
    return {name: max(cost[name] for cost in costs) if name == "memory MiB" else sum(cost[name] for cost in costs)
            for name in costs[0]}  # fmt: skip


def _sum_decoded(cost: Cost) -> float:
    return float(sum(int(count) for count in _DECODED.findall(cost.output)))


_LITE = ("model.name=tf_efficientnet_lite0", "train.img_size=160", "train.epochs=4", "data.valid_fold=0")


def _lite_ours(bench: Bench, number: int) -> Figures:
    return _median_rate(_EPOCH_RATE.findall(_train_ours(bench, "lite0", _LITE, bench.pages).output))


def _lite_bare(bench: Bench, number: int) -> Figures:
    return _run_bare(bench, {})


def _lite_bare_keeping(bench: Bench, number: int) -> Figures:
    """Run the bare loop with the allocator settings of doccls (`doccls.system.allocator`)."""
    return _run_bare(bench, {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)})


def _run_bare(bench: Bench, environment: Mapping[str, str]) -> Figures:
    command = [
        sys.executable, "-m", "benchmarks.bare_loop", "--model", "tf_efficientnet_lite0", "--size", "160",
        "--pages", "384", "--classes", "12", "--epochs", "4",
    ]  # fmt: skip
    folder = _make_folder(bench, "lite0-bare")
    cost = run(command, Path.cwd(), environment, folder / "console.txt")
    return _median_rate(_EPOCH_RATE.findall(cost.output))


def _lite_timm(bench: Bench, number: int) -> Figures:
    options = ("--model", "tf_efficientnet_lite0", "--img-size", "160", "--channels-last")
    return _median_rate(TIMM_RATE.findall(_train_timm(bench, "lite0-timm", options, 4, bench.pages).output))


def _median_rate(rates: Sequence[str]) -> Figures:
    """Return the median rate without the first epoch, in which libraries warm up."""
    return {"images/s": statistics.median(float(rate) for rate in rates[1:])}


def _load(contender: str) -> Callable[[Bench, int], Figures]:
    def measure(bench: Bench, number: int) -> Figures:
        folder = _make_folder(bench, f"loader-{contender}")
        if contender == "timm":
            _link_pages(bench.pages)
        command = [sys.executable, "-m", "benchmarks.loader_alone", contender, str(bench.pages)]
        cost = run(command, Path.cwd(), {"OMP_NUM_THREADS": "1"}, folder / "console.txt")
        return {"images/CPU-s": float(cost.output.rpartition("images_per_cpu_s=")[2])}

    return measure


def _start_ours(bench: Bench, number: int) -> Figures:
    sets = ("model.name=test_efficientnet", "train.img_size=32", "train.epochs=1", "data.valid_fold=0")
    return _list_costs(_train_ours(bench, "start", sets, bench.few))


def _start_timm(bench: Bench, number: int) -> Figures:
    options = ("--model", "test_efficientnet", "--img-size", "32")
    return _list_costs(_train_timm(bench, "start-timm", options, 1, bench.few))


_COSTS = ("CPU-s", "wall s", "memory MiB")
CASES = (
    Case(
        "a4", "A4 pages, test_efficientnet 224 px, one fold",
        {"doccls": _one_fold, "doccls, store filled": _one_fold_with_store, "timm": _one_timm}, (*_COSTS, "decoded"), 3,
    ),
    Case("a4-folds", "the same, five folds", {"doccls": _five_folds, "timm x 5": _five_timm}, (*_COSTS, "decoded"), 1),
    Case(
        "loader", "loader alone, A4 to 224 px, augmented", {"doccls": _load("ours"), "timm": _load("timm")},
        ("images/CPU-s",), 3,
    ),
    Case(
        "lite0", "training rate, tf_efficientnet_lite0 160 px",
        {"doccls": _lite_ours, "bare loop": _lite_bare, "bare loop that keeps freed memory": _lite_bare_keeping,
         "timm": _lite_timm},
        ("images/s",), 3,
    ),
    Case("start", "64 pages, one epoch at 32 px: start-up", {"doccls": _start_ours, "timm": _start_timm}, _COSTS, 3),
)  # fmt: skip

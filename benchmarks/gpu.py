"""Compare training steps with a bare loop, and the loader with the GPU's rate: `python -m benchmarks --gpu`."""

import itertools
import json
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu_steps import Network, StepFigures, measure_steps
from doccls.config.load import load_config
from doccls.config.schema import TrainConfig
from doccls.data.dataset import DocClsDataset, Pages
from doccls.data.loader import loading
from doccls.data.prepare import prepare_data
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.data.shared_memory import plan_loader
from doccls.data.store import StoreChoice
from doccls.data.transforms import Augmentation
from doccls.training.batches import measure_page

BATCH = 32
NETWORKS = (
    Network("tf_efficientnet_b3", 300),
    Network("swin_tiny_patch4_window7_224", 224),
    Network("convnext_tiny", 224),
    Network("swin_base_patch4_window7_224", 224),
)
_STEPS, _ROUNDS = 20, 3
# Maximum times of a measurement with its warm-up; it does not start if less time is left.
_EAGER_S, _COMPILED_S = 15.0, 120.0
PAGES = 96
_LOADER_S = 6.0


@dataclass(frozen=True)
class LoaderFigures:
    """Loader speed of one recipe, with the workers that `auto` chooses on this machine."""

    recipe: str
    size_px: int
    workers: int
    page_ms: float  # per page in one process
    rate: float  # images/s of all workers


def measure_gpu(folder: Path, minutes: float) -> None:
    """Measure as much as fits in the time limit; print each result as JSON, and two tables at the end."""
    device, end_s = torch.device("cuda"), time.monotonic() + 60 * minutes
    loaders = [measure_loader(folder, recipe, device) for recipe in ("basic", "highperf")]
    for loader in loaders:
        print(json.dumps(asdict(loader)), flush=True)
    steps, skipped = list[StepFigures](), list[str]()
    for compiled, speed in ((False, "reproducible"), (False, "fast"), (True, "fast"), (True, "reproducible")):
        for network in NETWORKS:
            if time.monotonic() + (_COMPILED_S if compiled else _EAGER_S) > end_s:
                skipped.append(f"{network.name} ({speed}{', compiled' if compiled else ''})")
                continue
            train = TrainConfig.model_validate(
                {"img_size": network.size_px, "batch_size": BATCH, "speed": speed, "compile": compiled, "amp": "bf16",
                 "grad_clip_norm": 1.0, "epochs": 1 + _ROUNDS}
            )  # fmt: skip
            try:
                steps.append(measure_steps(network, train, device, _STEPS, _ROUNDS))
                print(json.dumps(asdict(steps[-1])), flush=True)
            except Exception:  # noqa: BLE001 (continue with the others)
                print(f"{network.name}, {speed}, compile={compiled}: failed", flush=True)
                traceback.print_exc()
    print("\n".join([*render_steps(steps), "", *render_loaders(loaders, steps)]))
    if skipped:
        print(f"\nnot measured within {minutes:g} minutes: {', '.join(skipped)}")


def measure_loader(folder: Path, recipe: str, device: torch.device) -> LoaderFigures:
    """Measure loading of augmented pages from the store, with `data.num_workers: auto` and without a model."""
    path = folder / "loader.yaml"
    path.write_text("data:\n  train_csv: train.csv\n  image_dir_train: train\n")
    config = load_config(path, mode=recipe)
    size_px = config.train.img_size
    data = prepare_data(config, None, StoreChoice(folder / "loader_store", required=True))
    manifest = data.manifest
    pages = Pages(manifest.ids, manifest.paths, manifest.targets_N, size_px, config.page_px, 10**8, data.stored)
    dataset = DocClsDataset(pages, Augmentation(config.augment, size_px), config.project.seed)
    page_s = measure_page(dataset, next(_request_batches()))
    on_gpu = device.type == "cuda"
    plan = plan_loader("auto", BATCH * dataset.page_bytes, on_gpu, True, page_s)
    with loading(dataset, _request_batches(), plan.workers, on_gpu, plan.prefetch) as batches:
        for _ in range(max(1, plan.workers)):  # until all workers have started
            next(batches)
        started_s, count = time.perf_counter(), 0
        while time.perf_counter() - started_s < _LOADER_S:
            count += len(next(batches).indices_N)
        rate = count / (time.perf_counter() - started_s)
    return LoaderFigures(recipe, size_px, plan.workers, 1000 * page_s, rate)


def _request_batches() -> Iterator[BatchRequest]:
    for epoch in itertools.count():
        for first in range(0, PAGES, BATCH):
            yield BatchRequest(BatchPlace("train", 0, epoch), tuple(range(first, first + BATCH)))


def render_steps(steps: Sequence[StepFigures]) -> list[str]:
    """Render a table: medians over rounds, and the median of the ratios by round."""
    lines = ["| bf16, batch 32 | kernels | doccls, images/s | bare loop | ratio | memory, MiB |", "|---" * 6 + "|"]
    for figures in steps:
        ratio = statistics.median(own / other for own, other in zip(figures.ours, figures.bare, strict=True))
        rates = f"{statistics.median(figures.ours):.0f} | {statistics.median(figures.bare):.0f}"
        lines.append(f"| {figures.network} | {figures.kernels} | {rates} | {ratio:.3f} | {figures.memory_mib:.0f} |")
    return lines


def render_loaders(loaders: Sequence[LoaderFigures], steps: Sequence[StepFigures]) -> list[str]:
    """Render a table: the loader's rate, also as a fraction of the fastest network's rate."""
    fastest = max((statistics.median(figures.ours) for figures in steps), default=0.0)
    lines = [
        "| recipe | size | workers | ms per page | images/s | of the fastest network above |",
        "|---" * 6 + "|",
    ]
    for loader in loaders:
        fraction = f"{loader.rate / fastest:.0%}" if fastest else "not measured"
        cells = (loader.recipe, loader.size_px, loader.workers, f"{loader.page_ms:.1f}", f"{loader.rate:.0f}", fraction)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines

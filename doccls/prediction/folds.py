"""The probabilities of pages by all models of a run or a blend."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from accelerate import Accelerator

from doccls.config import Config
from doccls.data.dataset import Batch, DocClsDataset, Pages
from doccls.data.sampler import BatchPlace
from doccls.data.views import View
from doccls.oof.metrics import mean_probabilities
from doccls.prediction.members import Member
from doccls.prediction.pages import TestPages
from doccls.prediction.passes import list_requests, load_batches, load_model, predict_views
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ConsoleReporter
from doccls.training.checkpoint import BestWeights, read_best


def predict_members(
    members: Sequence[Member], pages: Sequence[TestPages], accelerator: Accelerator, views: Sequence[View]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return probabilities (n, classes) float64, the weighted mean over members, and those of each fold.

    `pages` are those of each member: the same, in its image size. Of a blend, whose labels don't need them, the folds'
    probabilities are not kept. All ranks must call.
    """
    total_NC, fold_probs = np.zeros((len(pages[0].ids), len(members[0].classes))), []
    for member, own_pages in zip(members, pages, strict=True):
        if member.recorded is not None and accelerator.is_main_process:
            print(f"[PREDICT] run={member.paths.run_id} weight={member.weight:.2f}", flush=True)
        own = _predict_folds(member, own_pages, accelerator, views)
        total_NC += member.weight * np.mean(own, axis=0)
        if member.recorded is None:
            fold_probs = own
    return total_NC, fold_probs


def _predict_folds(
    member: Member, pages: TestPages, accelerator: Accelerator, views: Sequence[View]
) -> list[np.ndarray]:
    """Return each fold's probabilities (n, classes) float64; rows without an image are 0. All ranks must call.

    Those of a fold are the mean over the views. Only one fold's weights are loaded at a time; one set of workers loads
    the pages for all folds.
    """
    config, probs = member.config, []
    rows = np.setdiff1d(np.arange(len(pages.ids)), pages.paths.find_missing())
    requests = list_requests(BatchPlace("predict", 0), rows, config, accelerator)
    all_requests = (request for _ in member.files for request in requests)
    dataset, is_stored = _build_dataset(member, pages), pages.stored is not None
    reporter = ConsoleReporter() if accelerator.is_main_process else RunLog(None)
    with load_batches(dataset, all_requests, config, is_stored, accelerator, reporter) as batches:
        for file in member.files:
            best = read_best(file)
            with reporter.progress(f"fold {best.fold}", len(requests)) as bar:
                own_batches = bar.watch(islice(batches, len(requests)))
                probs.append(_predict_fold(best, config, own_batches, len(pages.ids), accelerator, views))
            reporter.line(f"[PREDICT] fold={best.fold} best epoch={best.epoch} macro_f1={best.macro_f1:.5f}")
    return probs


def _predict_fold(
    best: BestWeights,
    config: Config,
    batches: Iterable[Batch],
    count: int,
    accelerator: Accelerator,
    views: Sequence[View],
) -> np.ndarray:
    """Return probabilities (count, classes) float64 of one fold's model; rows without an image are 0."""
    model = load_model(best, config, accelerator)
    indices, logits_VNC = predict_views(model, best, batches, accelerator, views)
    probs_NC = np.zeros((count, len(best.classes)))
    probs_NC[indices] = mean_probabilities(logits_VNC)
    return probs_NC


def _build_dataset(member: Member, pages: TestPages) -> DocClsDataset:
    config, unlabelled = member.config, np.full(len(pages.ids), -1)
    max_pixels = config.data.max_image_pixels
    return DocClsDataset(
        Pages(pages.ids, pages.paths, unlabelled, config.train.img_size, config.page_px, max_pixels, pages.stored)
    )

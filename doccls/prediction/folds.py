"""The probabilities of pages by all models of a run or a blend."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator

from doccls.data.dataset import DocClsDataset, Pages
from doccls.data.messages import format_examples
from doccls.data.sampler import BatchPlace
from doccls.data.views import parse_view
from doccls.errors import UserError
from doccls.oof.metrics import mean_probabilities
from doccls.oof.views import PLAIN, Setting
from doccls.prediction.members import Member
from doccls.prediction.pages import TestPages
from doccls.prediction.passes import load_batches, plan_pass, predict_fold
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ConsoleReporter
from doccls.training.checkpoint import read_best


def predict_members(
    members: Sequence[Member], pages: Sequence[TestPages], accelerator: Accelerator, setting: Setting
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return probabilities (n, classes) float64, the weighted mean over members, and those of each fold.

    `pages` are those of each member: the same, in its image size. Of a blend, whose labels don't need them, the folds'
    probabilities are not kept. All ranks must call.
    """
    total_NC, fold_probs = np.zeros((len(pages[0].ids), len(members[0].classes))), []
    for member, own_pages in zip(members, pages, strict=True):
        if member.recorded is not None and accelerator.is_main_process:
            print(f"[PREDICT] run={member.paths.run_id} weight={member.weight:.2f}", flush=True)
        own = _predict_folds(member, own_pages, accelerator, setting)
        total_NC += member.weight * np.mean(own, axis=0)
        if member.recorded is None:
            fold_probs = own
    return total_NC, fold_probs


def _predict_folds(member: Member, pages: TestPages, accelerator: Accelerator, setting: Setting) -> list[np.ndarray]:
    """Return each fold's probabilities (n, classes) float64; rows without an image are 0. All ranks must call.

    Those of a fold are the mean over the views. Only one fold's weights are loaded at a time; one set of workers loads
    the pages for all folds.
    """
    config, probs = member.config, []
    rows = np.setdiff1d(np.arange(len(pages.ids)), pages.paths.find_missing())
    own_pass = plan_pass(BatchPlace("predict", 0), rows, config, accelerator, setting.prior)
    requests = (request for _ in member.files for request in own_pass.requests)
    views = tuple(parse_view(name) for name in setting.views)
    dataset, is_stored = _build_dataset(member, pages), pages.stored is not None
    reporter = ConsoleReporter() if accelerator.is_main_process else RunLog(None)
    with load_batches(dataset, requests, config, is_stored, accelerator, reporter) as batches:
        for file in member.files:
            best = read_best(file)
            with reporter.progress(f"fold {best.fold}", len(own_pass.requests)) as bar:
                indices, logits_VNC = predict_fold(best, config, own_pass, bar.watch(batches), accelerator, views)
            _check_finite(indices, logits_VNC, best.fold, pages, setting)
            fold_NC = np.zeros((len(pages.ids), len(best.classes)))
            fold_NC[indices] = mean_probabilities(logits_VNC)
            probs.append(fold_NC)
            reporter.line(f"[PREDICT] fold={best.fold} best epoch={best.epoch} macro_f1={best.macro_f1:.5f}")
    return probs


def _check_finite(indices: np.ndarray, logits_VNC: np.ndarray, fold: int, pages: TestPages, setting: Setting) -> None:
    """Check that all logits are finite, on all ranks alike.

    Raises:
        UserError: they are not; names the pages.
    """
    bad = indices[~np.isfinite(logits_VNC).all(axis=(0, 2))].tolist()
    if bad:
        remedy = "" if setting == PLAIN else " (predict without --views and --adapt-bn)"
        raise UserError(
            format_examples(
                f"fold {fold}: logits are not finite{remedy}, of pages", [f"ID {pages.ids[row]!r}" for row in bad]
            )
        )


def _build_dataset(member: Member, pages: TestPages) -> DocClsDataset:
    config, unlabelled = member.config, np.full(len(pages.ids), -1)
    max_pixels = config.data.max_image_pixels
    return DocClsDataset(
        Pages(pages.ids, pages.paths, unlabelled, config.train.img_size, config.page_px, max_pixels, pages.stored)
    )

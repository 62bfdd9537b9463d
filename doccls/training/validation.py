"""Validate an epoch on the fold's pages and, with `valid.damage`, on their damaged copies."""

from itertools import islice
from typing import Literal

import numpy as np

from doccls.data.sampler import BatchPlace, list_evaluation
from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.oof.metrics import cross_entropy, macro_f1, selection_f1
from doccls.training.batches import TimedBatches
from doccls.training.checkpoint import BestEpoch
from doccls.training.engine import Engine
from doccls.training.evaluate import predict_logits


def validate_epoch(
    experiment: Experiment, engine: Engine, batches: TimedBatches, epoch: int
) -> tuple[BestEpoch, float]:
    """Validate the raw and the averaged weights; return the result and loss of the better ones (if equal, averaged).

    The same weights count for the pages and for their damaged copies: `valid.select` says by which they are compared.
    The loss is that of the pages. All ranks must call.

    Raises:
        UserError: a logit is not finite.
        Interrupted: a signal asked this rank or another one to stop.
    """
    valid = experiment.config.valid
    indices, logits_MNC = _predict(experiment, engine, batches, epoch, "validate")
    damaged_MNC = None
    if valid.has_damage:
        damaged_indices, damaged_MNC = _predict(experiment, engine, batches, epoch, "validate_damaged")
        assert np.array_equal(damaged_indices, indices)
    targets = experiment.data.manifest.targets_N[indices]
    compared_MNC = damaged_MNC if damaged_MNC is not None and valid.selects_damaged else logits_MNC
    scores = [selection_f1(targets, logits) for logits in compared_MNC]
    better = int(np.argmax(scores))
    logits, damaged = logits_MNC[better], None if damaged_MNC is None else damaged_MNC[better]
    validated = BestEpoch(
        epoch=epoch + 1,
        macro_f1=macro_f1(targets, logits),
        selection_f1=scores[better],
        weights=list(engine.modules)[better],
        indices_N=indices,
        logits_NC=logits,
        macro_f1_damaged=None if damaged is None else macro_f1(targets, damaged),
        damaged_logits_NC=damaged,
    )
    return validated, cross_entropy(targets, logits)


def _predict(
    experiment: Experiment,
    engine: Engine,
    batches: TimedBatches,
    epoch: int,
    phase: Literal["validate", "validate_damaged"],
) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices (n,), logits (weights, n, classes)) of the fold's pages or of their damaged copies."""
    fold, accelerator = engine.plan.fold, engine.accelerator
    valid = experiment.data.list_valid(fold)
    requests = list_evaluation(BatchPlace(phase, fold, epoch), valid, engine.division, accelerator.process_index)
    indices, logits_MNC = predict_logits(
        list(engine.modules.values()),
        engine.heartbeat.watch(islice(batches, len(requests)), "validate"),
        engine.normalize,
        engine.num_classes,
        accelerator,
    )
    is_finite_N = np.isfinite(logits_MNC).all(axis=(0, 2))
    if not is_finite_N.all():
        ids = [experiment.data.manifest.ids[index] for index in indices[~is_finite_N]]
        copies = " on damaged copies of their pages (valid.damage)" if phase == "validate_damaged" else ""
        raise UserError(
            f"fold {fold} epoch {epoch + 1}: {len(ids)} samples have non-finite logits{copies}, such as {ids[:5]}"
        )
    return indices, logits_MNC

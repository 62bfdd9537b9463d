"""The out-of-fold logits of all candidate views, computed once per fold, and the views that they recommend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
from accelerate import Accelerator

from doccls.config import Config
from doccls.config.paths import check_paths, find_output_problem, is_file
from doccls.data.dataset import Batch, build_dataset
from doccls.data.prepare import PreparedData, prepare_data
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.data.scan_cache import read_scan_cache
from doccls.data.store import StoreChoice
from doccls.data.views import CANDIDATES, IDENTITY, View, parse_view
from doccls.errors import UserError
from doccls.oof.adjust import read_own_predictions
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions
from doccls.oof.view_logits import FoldViews, describe_views, find_views, list_usable, write_views
from doccls.oof.views import choose_views, describe_choice, gather_rows, render_choice
from doccls.prediction.passes import list_requests, load_batches, load_model, predict_views
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ConsoleReporter, Reporter
from doccls.run.fingerprint import derive_fingerprint, digest_weights
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
from doccls.training.checkpoint import parse_config, read_best
from doccls.training.distributed import on_main

_NAMES = tuple(view.name for view in CANDIDATES)
# Of the mean absolute difference of probabilities between two computations of the same logits, by precision.
_CLOSE, _CLOSE_IN_HALF_PRECISION = 1e-3, 1e-2


@dataclass(frozen=True, eq=False)
class _Work:
    """The folds whose views are to be computed, and the pages they are computed from."""

    config: Config
    data: PreparedData
    missing: tuple[FoldPredictions, ...]


def choose_run_views(
    paths: RunPaths, config: Config, fingerprint: str, store: StoreChoice | None, accelerator: Accelerator
) -> tuple[View, ...]:
    """Return the views whose gain on the run's OOF predictions is real; the page itself without such predictions.

    The logits of all candidates are computed and stored for each finished fold that has none of its present checkpoint.
    Also prints, and writes to views.json, what was chosen and why. `config` is that of the prediction. All ranks must
    call.

    Raises:
        UserError: the training data is not there any more, or is not what it was; the logits can't be stored; those of
            a page itself are not finite.
    """
    reporter: Reporter = ConsoleReporter() if accelerator.is_main_process else RunLog(None)
    work = on_main(accelerator, lambda: _find_work(paths, config, fingerprint, store, reporter))
    if work is not None:
        _compute(paths, work, accelerator, reporter)
    return on_main(accelerator, lambda: _choose(paths, config, fingerprint, reporter))


def _list_finished(paths: RunPaths, config: Config, fingerprint: str) -> list[FoldPredictions]:
    """Return the predictions of the folds that have them and a checkpoint.

    That of an unfinished fold may still be replaced, and has no OOF logits with which to compare.
    """
    found, _ = read_own_predictions(paths, fingerprint, config.data.folds)
    return [predictions for predictions in found if is_file(paths.best_checkpoint(predictions.info.fold))]


# --- the logits ------------------------------------------------------------------------------------------------------


def _find_work(
    paths: RunPaths, config: Config, fingerprint: str, store: StoreChoice | None, reporter: Reporter
) -> _Work | None:
    """Return what is missing, with the run's training data if anything is. Only the main process may call.

    Raises:
        UserError: the training data is missing or has changed, or the logits can't be stored.
    """
    finished = _list_finished(paths, config, fingerprint)
    missing = tuple(predictions for predictions in finished if find_views(paths, predictions, _NAMES) is None)
    if not missing:
        return None
    problem = find_output_problem(paths.views(0).parent)
    if problem is not None:  # known before the passes, which take long
        raise UserError(
            f"--views auto can't store the logits of the views: {problem}. Make it a writable folder, or predict "
            "with --views none or a list of views"
        )
    # Not the prediction's, whose options, such as --on-bad-image, are for the test pages.
    training = parse_config(read_best(paths.best_checkpoint(missing[0].info.fold)))
    data = training.data.model_copy(update={"num_workers": config.data.num_workers})
    training = training.model_copy(update={"data": data})
    return _Work(training, _prepare(training, paths, fingerprint, store, reporter), missing)


def _prepare(
    config: Config, paths: RunPaths, fingerprint: str, store: StoreChoice | None, reporter: Reporter
) -> PreparedData:
    """Return the data of the training.

    Raises:
        UserError: it is missing, or something has changed since.
    """
    data = config.data
    hint = "(--views auto needs the training data once, to learn what views gain; --views none and a list don't)"
    try:
        check_paths(
            {"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")}
        )
        cache = read_scan_cache(paths.images, data.max_image_pixels, {})
        prepared = prepare_data(config, cache, store, reporter)
        found = derive_fingerprint(config, prepared.digest, prepared.assignment.digest(), digest_weights(config.model))
    except UserError as error:
        raise UserError(f"{error}\n{hint}") from error
    if found != fingerprint:
        raise UserError(
            f"the training data, folds or initial weights of run {paths.run_id} have changed since its training "
            f"(fingerprint {found[:12]} instead of {fingerprint[:12]}): its models may have been trained on the rows "
            f"that would choose the views. Restore {data.train_csv}, {data.image_dir_train} and the weights\n{hint}"
        )
    return replace(prepared, scans={})


def _compute(paths: RunPaths, work: _Work, accelerator: Accelerator, reporter: Reporter) -> None:
    """Compute and store the logits of all views of each fold in `work`. All ranks must call."""
    dataset = build_dataset(work.config, work.data.manifest, work.data.stored)
    requests = [
        request
        for predictions in work.missing
        for own_requests in _list_passes(work, predictions.info.fold, accelerator)
        for request in own_requests
    ]
    is_stored = work.data.stored is not None
    with load_batches(dataset, requests, work.config, is_stored, accelerator, reporter) as batches:
        for predictions in work.missing:
            views = _compute_fold(paths, work, predictions, batches, accelerator, reporter)
            on_main(accelerator, partial(write_views, paths.views(views.info.fold), views))


def _list_passes(work: _Work, fold: int, accelerator: Accelerator) -> list[list[BatchRequest]]:
    """Return this rank's batches of a fold's pages and, with valid.damage, those of their damaged copies."""
    places = [BatchPlace("validate", fold)]
    if work.config.valid.has_damage:
        places.append(BatchPlace("validate_damaged", fold))
    rows = work.data.list_valid(fold)
    return [list_requests(place, rows, work.config, accelerator) for place in places]


def _compute_fold(
    paths: RunPaths,
    work: _Work,
    predictions: FoldPredictions,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    reporter: Reporter,
) -> FoldViews:
    """Return the logits of all candidates of one fold. All ranks must call."""
    fold = predictions.info.fold
    best = read_best(paths.best_checkpoint(fold))
    model = load_model(best, work.config, accelerator)
    logits = []
    for requests in _list_passes(work, fold, accelerator):
        with reporter.progress(f"views of fold {fold}", len(requests)) as bar:
            own_batches = bar.watch(islice(batches, len(requests)))
            indices, logits_VNC = predict_views(model, best, own_batches, accelerator, CANDIDATES)
        assert np.array_equal(indices, list_usable(predictions))
        logits.append(logits_VNC)
    views = FoldViews(
        describe_views(paths, predictions, _NAMES), indices, logits[0], logits[1] if len(logits) > 1 else None
    )
    _check_logits(views, predictions, accelerator, reporter)
    return views


def _check_logits(views: FoldViews, predictions: FoldPredictions, accelerator: Accelerator, reporter: Reporter) -> None:
    """Warn if the page itself has other logits than when the fold was validated.

    Raises:
        UserError: its logits are not finite. (Another view with such logits is stored, and is no candidate.)
    """
    fold, usable = predictions.info.fold, np.isin(predictions.indices_N, views.indices_N)
    computed = [(views.logits_VNC, predictions.logits_NC)]
    if views.damaged_logits_VNC is not None and predictions.damaged_logits_NC is not None:
        computed.append((views.damaged_logits_VNC, predictions.damaged_logits_NC))
    half = {predictions.info.precision, accelerator.mixed_precision} != {"no"}
    for logits_VNC, validated_NC in computed:
        if not np.isfinite(logits_VNC[0]).all():
            raise UserError(f"fold {fold}: pages have non-finite logits even as they are: use --views none")
        own_NC, validated_NC = probabilities(logits_VNC[0]), probabilities(validated_NC[usable])
        difference = float(np.abs(own_NC - validated_NC).mean())
        if difference > (_CLOSE_IN_HALF_PRECISION if half else _CLOSE):
            reporter.line(
                f"[WARNING] fold {fold}: its probabilities differ from those of its validation by {difference:.4f} on "
                "average: other library versions, or another checkpoint? The views are chosen by the new ones"
            )


# --- the choice ------------------------------------------------------------------------------------------------------


def _choose(paths: RunPaths, config: Config, fingerprint: str, reporter: Reporter) -> tuple[View, ...]:
    """Choose, print and record the views. Only the main process may call."""
    folds = []
    for predictions in _list_finished(paths, config, fingerprint):
        views = find_views(paths, predictions, _NAMES)
        if views is not None and len(views.indices_N):  # None if the fold was finished only now, by a training process
            folds.append((predictions, views))
    if not folds:
        paths.views_record.unlink(missing_ok=True)  # of an earlier prediction, from folds that are not there any more
        reporter.line("[WARNING] --views auto: no finished fold has predictions to choose by: predicting without views")
        return (IDENTITY,)
    choice = choose_views(gather_rows(_keep_finite(folds, reporter)), folds[0][0].info.selected_by)
    for line in describe_choice(choice):
        reporter.line(f"[PREDICT] {line}")
    write_text(paths.views_record, render_choice(choice))
    return tuple(parse_view(name) for name in choice.views)


def _keep_finite(
    folds: Sequence[tuple[FoldPredictions, FoldViews]], reporter: Reporter
) -> list[tuple[FoldPredictions, FoldViews]]:
    """Keep the views whose logits are finite in every fold, and warn of the others."""
    kept = _NAMES
    for _, views in folds:
        finite = views.list_finite()
        for name in _NAMES:
            if name not in finite:
                reporter.line(
                    f"[WARNING] view {name} is not tried: its logits are not all finite in fold {views.info.fold}"
                )
        kept = tuple(name for name in kept if name in finite)
    return [(predictions, views.take(kept)) for predictions, views in folds]

"""The out-of-fold logits of candidate settings, computed once per fold, and the setting that they recommend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from accelerate import Accelerator

from doccls.config import Config
from doccls.config.paths import check_paths, find_output_problem, is_file
from doccls.data.dataset import Batch, build_dataset
from doccls.data.prepare import PreparedData, prepare_data
from doccls.data.sampler import BatchPlace
from doccls.data.scan_cache import read_scan_cache
from doccls.data.views import View, parse_view
from doccls.errors import UserError
from doccls.oof.adjust import read_own_predictions
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions
from doccls.oof.view_logits import FoldViews, describe_views, find_views, list_usable, write_views
from doccls.oof.views import Setting, choose_setting, describe_choice, stack_folds, write_choice
from doccls.prediction.batch_norm import MIN_PAGES, has_batch_norm
from doccls.prediction.candidates import Candidates
from doccls.prediction.members import Member, choose_member_store
from doccls.prediction.passes import Pass, load_batches, plan_pass, predict_fold
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ConsoleReporter, Reporter
from doccls.run.fingerprint import derive_fingerprint, digest_weights
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import parse_config, read_best
from doccls.training.distributed import on_main

# Of the mean absolute difference of probabilities between two computations of the same logits, by precision.
_CLOSE, _CLOSE_IN_HALF_PRECISION = 1e-3, 1e-2


@dataclass(frozen=True, eq=False)
class _Work:
    """The logits that are to be computed, and the pages they are computed from."""

    config: Config
    data: PreparedData
    missing: tuple[tuple[FoldPredictions, int | None], ...]  # of these folds, with these priors


def choose_run_setting(member: Member, candidates: Candidates, num_pages: int, accelerator: Accelerator) -> Setting:
    """Return the setting whose gain on the run's OOF predictions is real; the plain one without such predictions.

    The logits of all candidates are computed and stored for each finished fold that has none of its present checkpoint.
    Also prints, and writes to views.json, what was chosen and why. `num_pages` are to be predicted with it. All ranks
    must call.

    Raises:
        UserError: the training data is not there any more, or is not what it was; the logits can't be stored; those of
            a page itself are not finite.
    """
    reporter: Reporter = ConsoleReporter() if accelerator.is_main_process else RunLog(None)
    candidates = on_main(accelerator, lambda: _keep_possible(member, candidates, num_pages, reporter))
    if candidates.is_single:
        return candidates.plain
    work = on_main(accelerator, lambda: _find_work(member, candidates, reporter))
    if work is not None:
        _compute(member.paths, candidates, work, accelerator, reporter)
    return on_main(accelerator, lambda: _choose(member, candidates, reporter))


def _keep_possible(member: Member, candidates: Candidates, num_pages: int, reporter: Reporter) -> Candidates:
    """Leave out BatchNorm statistics of the pages, and say why, where they can't be tried."""
    if len(candidates.priors) == 1:
        return candidates
    finished = _list_finished(member)
    fewest = min([num_pages, *(len(list_usable(predictions)) for predictions in finished)])
    reason = _find_batch_norm_problem(member, fewest, "of the smallest fold, or to predict,")
    if any(predictions.info.selected_by == "clean" for predictions in finished):
        reason = "the run's epochs were not selected on damaged pages (valid.damage, valid.select)"
    if reason is None:
        return candidates
    reporter.line(f"[WARNING] --adapt-bn auto: BatchNorm statistics stay those of the training: {reason}")
    return replace(candidates, priors=candidates.priors[:1])


def check_batch_norm(member: Member, num_pages: int) -> None:
    """Check that a model's BatchNorm statistics can be mixed with those of `num_pages`.

    Raises:
        UserError: it has none, or there are too few pages.
    """
    reason = _find_batch_norm_problem(member, num_pages, "to predict")
    if reason is not None:
        raise UserError(f"--adapt-bn: {reason}: predict with --adapt-bn off")


def _find_batch_norm_problem(member: Member, num_pages: int, which: str) -> str | None:
    if not has_batch_norm(read_best(member.files[0]).state_dict):
        return f"model {member.config.model.name} has no BatchNorm layers"
    if num_pages < MIN_PAGES:
        return f"{num_pages} pages {which} say too little; at least {MIN_PAGES} are needed"
    return None


def _list_finished(member: Member) -> list[FoldPredictions]:
    """Return the predictions of the folds that have them and a checkpoint.

    That of an unfinished fold may still be replaced, and has no OOF logits with which to compare. A fold without a
    usable image has nothing to choose by.
    """
    found, _ = read_own_predictions(member.paths, member.fingerprint, member.config.data.folds)
    return [
        predictions
        for predictions in found
        if is_file(member.paths.best_checkpoint(predictions.info.fold)) and len(list_usable(predictions))
    ]


# --- the logits ------------------------------------------------------------------------------------------------------


def _find_work(member: Member, candidates: Candidates, reporter: Reporter) -> _Work | None:
    """Return what is missing, with the run's training data if anything is. Only the main process may call.

    Raises:
        UserError: the training data is missing or has changed, or the logits can't be stored.
    """
    paths = member.paths
    problem = find_output_problem(paths.views(0).parent)
    if problem is not None:  # known before the passes, which take long
        raise UserError(
            f"{candidates.options} stores OOF logits and its choice in the run's folder: {problem}. Make it writable, "
            "or name the views and the prior strength"
        )
    missing = tuple(
        (predictions, prior)
        for predictions in _list_finished(member)
        for prior in candidates.priors
        if find_views(paths, predictions, candidates.names, prior) is None
    )
    if not missing:
        return None
    # Not the prediction's, whose options, such as --on-bad-image, are for the test pages.
    training = parse_config(read_best(paths.best_checkpoint(missing[0][0].info.fold)))
    data = training.data.model_copy(update={"num_workers": member.config.data.num_workers})
    training = training.model_copy(update={"data": data})
    return _Work(training, _prepare(training, member, candidates, reporter), missing)


def _prepare(config: Config, member: Member, candidates: Candidates, reporter: Reporter) -> PreparedData:
    """Return the data of the training.

    Raises:
        UserError: it is missing, or something has changed since.
    """
    data = config.data
    hint = f"({candidates.options} needs the training data once, to learn what gains; other settings don't)"
    try:
        check_paths(
            {"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")}
        )
        cache = read_scan_cache(member.paths.images, data.max_image_pixels, {})
        prepared = prepare_data(config, cache, choose_member_store(member), reporter)
        found = derive_fingerprint(config, prepared.digest, prepared.assignment.digest(), digest_weights(config.model))
    except UserError as error:
        raise UserError(f"{error}\n{hint}") from error
    if found != member.fingerprint:
        raise UserError(
            f"the training data, folds or initial weights of run {member.paths.run_id} have changed since its training "
            f"(fingerprint {found[:12]} instead of {member.fingerprint[:12]}): its models may have been trained on the "
            f"rows that would choose. Restore {data.train_csv}, {data.image_dir_train} and the weights\n{hint}"
        )
    return replace(prepared, scans={})


def _compute(
    paths: RunPaths, candidates: Candidates, work: _Work, accelerator: Accelerator, reporter: Reporter
) -> None:
    """Compute and store the missing logits. All ranks must call."""
    dataset = build_dataset(work.config, work.data.manifest, work.data.stored)
    passes = [_plan(work, predictions, prior, accelerator) for predictions, prior in work.missing]
    requests = (request for each in passes for request in each.requests)
    is_stored = work.data.stored is not None
    with load_batches(dataset, requests, work.config, is_stored, accelerator, reporter) as batches:
        for (predictions, prior), own_pass in zip(work.missing, passes, strict=True):
            views = _compute_fold(paths, candidates, work.config, predictions, own_pass, batches, accelerator, reporter)
            on_main(accelerator, partial(write_views, paths.views(views.info.fold, prior), views))


def _plan(work: _Work, predictions: FoldPredictions, prior: int | None, accelerator: Accelerator) -> Pass:
    """Plan a pass of a fold's pages, or of their damaged copies: those whose score selected its epoch."""
    fold = predictions.info.fold
    is_clean = predictions.info.selected_by == "clean"
    place = BatchPlace("validate" if is_clean else "validate_damaged", fold)
    return plan_pass(place, work.data.list_valid(fold), work.config, accelerator, prior)


def _compute_fold(
    paths: RunPaths,
    candidates: Candidates,
    config: Config,
    predictions: FoldPredictions,
    own_pass: Pass,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    reporter: Reporter,
) -> FoldViews:
    """Return a fold's logits of the candidates and of the views that its file has. All ranks must call."""
    fold, prior = predictions.info.fold, own_pass.prior
    stored = on_main(accelerator, lambda: _list_stored(paths, predictions, prior))
    computed = tuple(dict.fromkeys((*candidates.computed, *stored)))  # a file that is replaced loses no view
    best = read_best(paths.best_checkpoint(fold))
    what = f"views of fold {fold}" if prior is None else f"statistics of fold {fold}, prior {prior}"
    with reporter.progress(what, len(own_pass.requests)) as bar:
        indices, logits_VNC = predict_fold(best, config, own_pass, bar.watch(batches), accelerator, computed)
    assert np.array_equal(indices, list_usable(predictions))
    names = tuple(view.name for view in computed)
    views = FoldViews(describe_views(paths, predictions, names, prior), indices, logits_VNC)
    _check_logits(views, predictions, accelerator, reporter)
    return views


def _list_stored(paths: RunPaths, predictions: FoldPredictions, prior: int | None) -> tuple[View, ...]:
    """Return the views that the fold's file has. Only the main process may call."""
    stored = find_views(paths, predictions, None, prior)
    return () if stored is None else tuple(parse_view(name) for name in stored.info.views)


def _check_logits(views: FoldViews, predictions: FoldPredictions, accelerator: Accelerator, reporter: Reporter) -> None:
    """Warn if the page itself has other logits than when the fold was validated.

    Raises:
        UserError: its logits are not finite. (Another view with such logits is stored, and is no candidate.)
    """
    if views.info.prior is not None:
        return  # other statistics give other logits
    fold, usable = predictions.info.fold, np.isin(predictions.indices_N, views.indices_N)
    if not np.isfinite(views.logits_VNC[0]).all():
        raise UserError(f"fold {fold}: pages have non-finite logits even as they are: use --views none --adapt-bn off")
    own_NC, validated_NC = probabilities(views.logits_VNC[0]), probabilities(predictions.selecting_logits_NC[usable])
    difference = float(np.abs(own_NC - validated_NC).mean())
    half = {predictions.info.precision, accelerator.mixed_precision} != {"no"}
    if difference > (_CLOSE_IN_HALF_PRECISION if half else _CLOSE):
        reporter.line(
            f"[WARNING] fold {fold}: its probabilities differ from those of its validation by {difference:.4f} on "
            "average: other library versions, or another checkpoint? The new ones decide"
        )


# --- the choice ------------------------------------------------------------------------------------------------------


def _choose(member: Member, candidates: Candidates, reporter: Reporter) -> Setting:
    """Choose, print and record the setting. Only the main process may call."""
    paths, folds = member.paths, []
    for predictions in _list_finished(member):
        by_prior = [find_views(paths, predictions, candidates.names, prior) for prior in candidates.priors]
        found = [views for views in by_prior if views is not None]
        if len(found) == len(by_prior):  # if not, the fold was finished only now, by a training process
            folds.append((predictions, found))
    if not folds:
        paths.views_record.unlink(missing_ok=True)  # of an earlier prediction, from folds that are not there any more
        reporter.line(
            f"[WARNING] {candidates.options}: no finished fold has predictions to choose by: predicting with "
            f"{candidates.plain.text}"
        )
        return candidates.plain
    rows = stack_folds(*_keep_finite(folds, candidates, reporter))
    choice = choose_setting(rows, folds[0][0].info.selected_by, candidates.keeps_views)
    for line in describe_choice(choice):
        reporter.line(f"[PREDICT] {line}")
    write_choice(paths, choice)
    return choice.used


def _keep_finite(
    folds: Sequence[tuple[FoldPredictions, Sequence[FoldViews]]], candidates: Candidates, reporter: Reporter
) -> tuple[list[tuple[FoldPredictions, list[FoldViews]]], tuple[int | None, ...]]:
    """Return the folds with the views whose logits are finite in all of them, and the priors; warn of the others.

    Statistics that make logits of a page itself infinite are left out, and then views.

    Raises:
        UserError: one of the views that are averaged anyway is not finite, or the page itself is not.
    """
    plain = candidates.names[0]
    finite_of = [[views.list_finite() for views in by_prior] for _, by_prior in folds]
    is_kept = [all(plain in by_prior[place] for by_prior in finite_of) for place in range(len(candidates.priors))]
    for prior, kept in zip(candidates.priors, is_kept, strict=True):
        if not kept:
            problem = f"logits of view {plain} with BatchNorm prior {prior} are not all finite"
            if prior == candidates.priors[0]:
                raise UserError(f"--views, --adapt-bn: {problem} on the validation pages: predict without them")
            reporter.line(f"[WARNING] prior {prior} is not tried: {problem}")
    names = candidates.names
    for (predictions, _), by_prior in zip(folds, finite_of, strict=True):
        for name in names:
            if any(kept and name not in finite for kept, finite in zip(is_kept, by_prior, strict=True)):
                problem = f"its logits are not all finite in fold {predictions.info.fold}"
                if candidates.keeps_views:
                    raise UserError(f"--views: view {name} can't be used: {problem}")
                reporter.line(f"[WARNING] view {name} is not tried: {problem}")
                names = tuple(other for other in names if other != name)
    kept_folds = [
        (predictions, [views.take(names) for views, kept in zip(by_prior, is_kept, strict=True) if kept])
        for predictions, by_prior in folds
    ]
    return kept_folds, tuple(prior for prior, kept in zip(candidates.priors, is_kept, strict=True) if kept)

"""`doccls predict --views auto`: the OOF logits of all views are right, stored once, and computed anew if stale."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from doccls.config import Config
from doccls.data.dataset import Batch, SampleKey, build_dataset
from doccls.data.prepare import PreparedData, prepare_data
from doccls.data.sampler import BatchPlace
from doccls.data.views import CANDIDATES
from doccls.errors import UserError
from doccls.model.build import build_model
from doccls.oof.adjust import learn_adjustment
from doccls.oof.calibrate import temper
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, read_predictions, write_predictions
from doccls.oof.view_logits import average_stored, read_views, write_views
from doccls.predict import add_arguments, predict
from doccls.prediction import oof_views, passes
from doccls.prediction.batch_norm import adapt_batch_norm
from doccls.prediction.candidates import PRIORS
from doccls.run.fingerprint import derive_fingerprint
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import BestWeights, read_best, write_best
from doccls.training.evaluate import Normalizer

MakeConfig = Callable[..., Config]
MakeData = Callable[..., Path]
NAMES = tuple(view.name for view in CANDIDATES)
COUNT, CLASSES = 12, ("a", "b", "c")
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "id": lambda page: page,
    "rot90": np.rot90,
    "rot180": lambda page: np.rot90(page, 2),
    "rot270": lambda page: np.rot90(page, 3),
    "hflip": np.fliplr,
    "vflip": np.flipud,
    "transpose": lambda page: page.transpose(1, 0, 2),
    "transverse": lambda page: np.rot90(page, 2).transpose(1, 0, 2),
}


@pytest.fixture
def config(make_data: MakeData, make_config: MakeConfig, tmp_path: Path) -> Config:
    make_data([f"t{number}" for number in range(3)], ["a"] * 3, table="sample.csv", folder="test")
    make_data([f"i{number}" for number in range(COUNT)], [CLASSES[number % 3] for number in range(COUNT)])
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "train").iterdir()) + sorted((tmp_path / "test").iterdir()):
        pixels = rng.integers(0, 256, (8, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(path, quality=95)
    return make_config(
        data={"sample_csv": "sample.csv", "image_dir_test": "test", "folds": 2, "num_workers": 0},
        model={"name": "test_resnet", "pretrained": False},
        train={"img_size": 32, "batch_size": 4, "amp": False, "cpu_threads": 1},
        valid={"damage": "light"},
    )


@pytest.fixture
def data(config: Config) -> PreparedData:
    return prepare_data(config)


def load_model(best: BestWeights, config: Config) -> torch.nn.Module:
    model = build_model(config.model, 3, 32).eval()
    model.load_state_dict(best.state_dict)
    return model


def predict_page(model: torch.nn.Module, page: np.ndarray) -> np.ndarray:
    """Return the logits (classes,) of one page (size, size, 3) uint8."""
    pixels = torch.from_numpy(((page / 255 - 0.5) / 0.25).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits: np.ndarray = model(pixels)[0].numpy()
    return logits


def write_checkpoint(run: RunPaths, config: Config, data: PreparedData, fold: int, seed: int) -> BestWeights:
    torch.manual_seed(seed)
    model = build_model(config.model, 3, 32)
    fingerprint = derive_fingerprint(config, data.digest, data.assignment.digest(), None)
    best = BestWeights(
        {name: value.clone() for name, value in model.state_dict().items()},
        fingerprint, fold, 1, 0.5, "raw", CLASSES, (0.5,) * 3, (0.25,) * 3, "no",
        config.model_dump(mode="json", exclude={"provenance"}),
    )  # fmt: skip
    write_best(run.best_checkpoint(fold), best)
    return best


def compute_logits(config: Config, data: PreparedData, best: BestWeights, view: str, is_damaged: bool) -> np.ndarray:
    """Return the logits (n, classes) of a fold's pages, or of their damaged copies, in a view, page by page."""
    dataset = build_dataset(config, data.manifest)
    pages = [dataset[SampleKey(row, None, is_damaged)][0] for row in data.list_valid(best.fold).tolist()]
    model = load_model(best, config)
    return np.stack([predict_page(model, TURNS[view](page)) for page in pages])


@pytest.fixture
def run(config: Config, data: PreparedData, tmp_path: Path) -> RunPaths:
    """Return a run of two finished folds, as training leaves it."""
    paths = RunPaths(tmp_path / "runs" / "20260101" / "v1-abc")
    for fold in range(2):
        best = write_checkpoint(paths, config, data, fold, seed=fold)
        rows = data.list_valid(fold)
        info = PredictionsInfo(
            best.fingerprint, fold, 2, COUNT, CLASSES, tuple(data.manifest.ids[row] for row in rows), (), 1, 0.5,
            damage="light", macro_f1_damaged=0.5, selected_by="damaged",
        )  # fmt: skip
        logits, damaged = (compute_logits(config, data, best, "id", is_damaged) for is_damaged in (False, True))
        predictions = FoldPredictions(info, rows, logits, data.manifest.targets_N[rows], damaged)
        write_predictions(paths.predictions(fold), predictions)
    return paths


def run_predict(run: RunPaths, *args: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert predict(parser.parse_args([str(run.root), *args])) == 0


def plant_gain(run: RunPaths) -> None:
    """Replace the stored logits by ones with which hflip is right and the page itself, mostly, is not."""
    for fold in range(2):
        stored, predictions = read_views(run.views(fold)), read_predictions(run.predictions(fold))
        right = 6 * np.eye(3, dtype=np.float32)[predictions.targets_N]
        noise = np.random.default_rng(fold).normal(0, 1, (len(NAMES), *right.shape)).astype(np.float32)
        noise[NAMES.index("hflip")] += right
        write_views(run.views(fold), dataclasses.replace(stored, logits_VNC=noise))


# --- the logits ------------------------------------------------------------------------------------------------------


def test_logits_of_each_view_of_damaged_copies_are_stored(
    config: Config, data: PreparedData, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(run, "--views", "auto", "--on-bad-image", "skip")
    for fold in range(2):
        stored, best = read_views(run.views(fold)), read_best(run.best_checkpoint(fold))
        assert stored.info.views == NAMES and np.array_equal(stored.indices_N, data.list_valid(fold))
        for view in TURNS:
            expected = compute_logits(config, data, best, view, True)
            np.testing.assert_allclose(stored.logits_VNC[NAMES.index(view)], expected, atol=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("[WARNING]")]
    assert any(line.startswith("[PREDICT] by the damaged OOF predictions of folds 0, 1: ") for line in lines)
    assert sum(line.startswith("[PREDICT] view ") for line in lines) == len(NAMES) - 1
    assert json.loads(run.views_record.read_text())["decided_by"] == "damaged"


def test_clean_pages_decide_without_damaged_copies(
    config: Config, run: RunPaths, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = config.model_copy(update={"valid": type(config.valid)()})
    data = prepare_data(clean)
    for fold in range(2):
        best = write_checkpoint(run, clean, data, fold, seed=fold)
        predictions = read_predictions(run.predictions(fold))
        info = dataclasses.replace(
            predictions.info, fingerprint=best.fingerprint, damage="none", macro_f1_damaged=None, selected_by="clean"
        )
        write_predictions(run.predictions(fold), dataclasses.replace(predictions, info=info, damaged_logits_NC=None))
    run_predict(run, "--views", "auto")
    assert "by the clean OOF predictions" in capsys.readouterr().out
    stored, best = read_views(run.views(0)), read_best(run.best_checkpoint(0))
    np.testing.assert_allclose(stored.logits_VNC[4], compute_logits(clean, data, best, NAMES[4], False), atol=1e-4)


def test_stored_logits_are_read_without_the_training_data(run: RunPaths, tmp_path: Path) -> None:
    run_predict(run, "--views", "auto")
    before = {path: path.stat() for path in (run.views(0), run.views(1))}
    files = [path.read_bytes() for path in (run.results.submission, run.results.test_probabilities, run.views_record)]
    (tmp_path / "train.csv").unlink()
    run_predict(run, "--views", "auto")
    assert {path: path.stat() for path in before} == before
    assert [
        path.read_bytes() for path in (run.results.submission, run.results.test_probabilities, run.views_record)
    ] == files


def test_only_stale_and_damaged_files_are_computed_anew(
    config: Config, data: PreparedData, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(run, "--views", "auto")
    files, kept = [run.views(fold).read_bytes() for fold in range(2)], read_identity(run.views(0))
    capsys.readouterr()
    best = write_checkpoint(run, config, data, 1, seed=7)
    run_predict(run, "--views", "auto")
    assert read_identity(run.views(0)) == kept and run.views(1).read_bytes() != files[1]
    expected = compute_logits(config, data, best, "hflip", True)
    np.testing.assert_allclose(read_views(run.views(1)).logits_VNC[NAMES.index("hflip")], expected, atol=1e-4)
    # The fold's validation was of other weights:
    assert "[WARNING] fold 1: its probabilities differ from those of its validation by 0." in capsys.readouterr().out
    run.views(0).write_bytes(files[0][:-9])
    run_predict(run, "--views", "auto")
    assert run.views(0).read_bytes() == files[0]


def test_changed_and_missing_training_data_is_refused(run: RunPaths, tmp_path: Path) -> None:
    page = tmp_path / "train" / "i3.jpg"
    kept = page.read_bytes()
    Image.new("RGB", (24, 32), "red").save(page)
    with pytest.raises(
        UserError, match=r"training data, folds or initial weights of run v1-abc have changed .*Restore"
    ):
        run_predict(run, "--views", "auto")
    page.write_bytes(kept)
    (tmp_path / "train.csv").rename(tmp_path / "gone.csv")
    with pytest.raises(UserError, match=r"(?s)data.train_csv: .*--views auto needs the training data once"):
        run_predict(run, "--views", "auto")
    assert not run.views(0).exists() and not run.results.submission.exists()


def read_identity(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written anew: its inode and the time of its last change."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def spoil(monkeypatch: pytest.MonkeyPatch, *views: str) -> None:
    """Make one logit of each pass and view infinite."""
    from doccls.prediction.passes import predict_fold as real

    def overflow(*args: object) -> tuple[np.ndarray, np.ndarray]:
        indices, logits = real(*args)  # type: ignore[arg-type]
        logits[[NAMES.index(view) for view in views], 0, 0] = np.inf
        return indices, logits

    monkeypatch.setattr(oof_views, "predict_fold", overflow)


def test_non_finite_logits_of_the_page_itself_are_refused(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "id")
    with pytest.raises(UserError, match="fold 0: pages have non-finite logits even as they are"):
        run_predict(run, "--views", "auto")


def test_view_with_non_finite_logits_is_stored_and_left_out(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(run, "--views", "auto")
    plant_gain(run)
    kept = read_identity(run.views(0))
    run.views(1).unlink()
    spoil(monkeypatch, "hflip", "scale1.1")
    for _ in range(2):  # the second time, nothing is computed
        capsys.readouterr()
        run_predict(run, "--views", "auto")
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[WARNING] view ")]
        assert warnings == [
            f"[WARNING] view {view} is not tried: its logits are not all finite in fold 1"
            for view in ("hflip", "scale1.1")
        ]
        # Not even of the other fold, in which hflip is right:
        scores = json.loads(run.views_record.read_text())["scores"]
        names = [name for name in NAMES[1:] if name not in ("hflip", "scale1.1")]
        assert [score["setting"]["views"] for score in scores] == [[name] for name in names]
        assert read_identity(run.views(0)) == kept
        assert np.isinf(read_views(run.views(1)).logits_VNC[NAMES.index("hflip"), 0, 0])
        monkeypatch.setattr(oof_views, "_compute", None)


def test_unwritable_folder_is_refused_before_the_passes(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oof_views, "_compute", None)
    run.views(0).parent.write_text("a file")
    with pytest.raises(
        UserError, match=r"--views auto stores OOF logits and its choice in the run's folder: not a folder: .*views "
    ):
        run_predict(run, "--views", "auto")


# --- the choice ------------------------------------------------------------------------------------------------------


def test_chosen_views_predict_and_their_oof_logits_calibrate(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run_predict(run, "--views", "auto")
    plant_gain(run)
    alone = []
    for fold in range(2):  # not calibrated, since without predictions
        run.predictions(fold).rename(run.root / f"{fold}")
    for view in ("id", "hflip"):
        run_predict(run, "--views", view)
        alone.append(np.load(run.results.test_probabilities).astype(float))
    for fold in range(2):
        (run.root / f"{fold}").rename(run.predictions(fold))
    capsys.readouterr()
    run_predict(run, "--views", "auto")
    out = capsys.readouterr().out
    choice = json.loads(run.views_record.read_text())
    assert choice["used"]["views"] == ["id", "hflip"] and choice["gain_low"] > 0
    assert "[PREDICT] predicting with views id,hflip\n" in out
    assert json.loads(run.results.submission_record.read_text())["views"] == ["id", "hflip"]
    predictions = [read_predictions(run.predictions(fold)) for fold in range(2)]
    averaged, lacking = average_stored(run, predictions, ("id", "hflip"))
    adjustment, plain = learn_adjustment(averaged), learn_adjustment(predictions)
    assert not lacking and adjustment is not None and plain is not None
    assert adjustment.temperature != pytest.approx(plain.temperature, rel=0.01)
    for each, views in ((predictions[fold], read_views(run.views(fold))) for fold in range(2)):
        expected = np.mean([probabilities(views.logits_VNC[NAMES.index(name)]) for name in ("id", "hflip")], 0)
        own = averaged[each.info.fold].damaged_logits_NC
        assert own is not None
        np.testing.assert_allclose(probabilities(own), expected, rtol=1e-5)
    assert f"[PREDICT] temperature={adjustment.temperature:.3f} " in out
    expected = temper(np.mean(alone, axis=0), adjustment.temperature)
    np.testing.assert_allclose(np.load(run.results.test_probabilities), expected, rtol=1e-4)
    files = [
        path.read_bytes()
        for path in (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    ]
    run_predict(run, "--views", "id,hflip")
    assert [
        path.read_bytes()
        for path in (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    ] == files


def test_list_of_other_views_is_not_calibrated_fold_by_fold(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run_predict(run, "--views", "auto")
    run.views(1).unlink()
    capsys.readouterr()
    run_predict(run, "--views", "rot90,id")
    out = capsys.readouterr().out
    lacking = "not used for calibration: fold 1 has no finite OOF logits of views rot90,id (--views auto stores some)"
    assert lacking in out
    assert "folds 0 of 2)" in out
    run_predict(run, "--views", "scale0.7,id")
    out = capsys.readouterr().out
    assert out.count("not used for calibration: fold ") == 2 and "probabilities are not calibrated" in out


def test_without_real_gain_the_files_are_those_of_no_views(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run_predict(run)
    files = [
        path.read_bytes()
        for path in (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    ]
    run_predict(run, "--views", "auto")
    assert json.loads(run.views_record.read_text())["used"] == {"views": ["id"], "prior": None}
    assert [
        path.read_bytes()
        for path in (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    ] == files
    assert "predicting with" not in capsys.readouterr().out


def test_run_without_finished_fold_is_predicted_without_views(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run.views_record.write_text("of an earlier prediction")
    for fold in range(2):
        run.predictions(fold).unlink()
    run_predict(run, "--views", "auto")
    assert "[WARNING] --views auto: no finished fold has predictions to choose by" in capsys.readouterr().out
    assert not run.views_record.exists() and run.results.submission.exists()


# --- BatchNorm statistics --------------------------------------------------------------------------------------------


@pytest.fixture
def few_pages_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oof_views, "MIN_PAGES", 2)


def compute_adapted(config: Config, data: PreparedData, best: BestWeights, prior: int) -> np.ndarray:
    """Return the logits (n, classes) of a fold's damaged copies with their statistics."""
    model = build_model(config.model, 3, 32).eval()
    model.load_state_dict(best.state_dict)
    dataset, rows = build_dataset(config, data.manifest), data.list_valid(best.fold).tolist()
    pages = np.stack([dataset[SampleKey(row, None, True)][0] for row in rows])
    inputs = torch.from_numpy(((pages / 255 - 0.5) / 0.25).astype(np.float32)).permute(0, 3, 1, 2)
    accelerator = Accelerator(cpu=True)
    batch = Batch(torch.from_numpy(pages), torch.zeros(len(rows)), torch.tensor(rows), BatchPlace("predict", 0))
    normalize = Normalizer(best.mean, best.std, accelerator.device)
    adapt_batch_norm(model, [batch], normalize, accelerator, len(rows), prior)
    with torch.no_grad():
        logits: np.ndarray = model(inputs).numpy()
    return logits


@pytest.mark.usefixtures("few_pages_suffice")
def test_logits_with_statistics_of_the_damaged_copies_decide(
    config: Config, data: PreparedData, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(run)
    plain = np.load(run.results.test_probabilities)
    run_predict(run, "--adapt-bn", "auto")
    for fold, prior in product(range(2), PRIORS):
        stored, best = read_views(run.views(fold, prior)), read_best(run.best_checkpoint(fold))
        assert stored.info.views == ("id",) and stored.info.prior == prior
        expected = compute_adapted(config, data, best, prior)
        np.testing.assert_allclose(stored.logits_VNC[0], expected, atol=1e-5)
        assert np.abs(stored.logits_VNC - read_views(run.views(fold)).logits_VNC).max() > 3e-4
    for fold in range(2):  # as if prior 64 were right and the training's statistics were not
        stored, predictions = read_views(run.views(fold, 64)), read_predictions(run.predictions(fold))
        right = 6 * np.eye(3, dtype=np.float32)[predictions.targets_N][None]
        write_views(run.views(fold, 64), dataclasses.replace(stored, logits_VNC=right))
    capsys.readouterr()
    run_predict(run, "--adapt-bn", "auto")
    out = capsys.readouterr().out
    assert json.loads(run.views_record.read_text())["used"] == {"views": ["id"], "prior": 64}
    assert "[PREDICT] predicting with view id, BatchNorm prior 64\n" in out
    record = json.loads(run.results.submission_record.read_text())
    assert record["adapt_bn"] == 64 and "views" not in record
    assert "folds 0, 1 of 2)" in out and "not used for calibration" not in out
    files = [path.read_bytes() for path in (run.results.submission, run.results.test_probabilities)]
    assert np.abs(np.load(run.results.test_probabilities) - plain).max() > 1e-3
    run_predict(run, "--adapt-bn", "64", "--num-workers", "1")
    assert [path.read_bytes() for path in (run.results.submission, run.results.test_probabilities)] == files


@pytest.mark.usefixtures("few_pages_suffice")
def test_views_that_are_stored_stay_when_others_are_computed(run: RunPaths) -> None:
    run_predict(run, "--views", "auto")
    before = read_views(run.views(0))
    run_predict(run, "--views", "scale0.8,id", "--adapt-bn", "auto")
    after = read_views(run.views(0))
    assert after.info.views == ("id", "scale0.8", *NAMES[1:])
    assert np.array_equal(after.take(NAMES).logits_VNC, before.logits_VNC)
    assert read_views(run.views(0, 64)).info.views == ("id", "scale0.8")


@pytest.mark.usefixtures("few_pages_suffice")
def test_statistics_that_are_not_finite_are_not_tried(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(model: torch.nn.Module, batches: Iterator[Batch], *arguments: object) -> None:
        assert list(batches)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(torch.inf)

    monkeypatch.setattr(passes, "adapt_batch_norm", overflow)
    run_predict(run, "--adapt-bn", "auto")
    out = capsys.readouterr().out
    assert "[WARNING] prior 64 is not tried: logits of view id with BatchNorm prior 64 are not all finite\n" in out
    assert json.loads(run.views_record.read_text())["used"] == {"views": ["id"], "prior": None}
    with pytest.raises(UserError, match="view id with BatchNorm prior 8 are not all finite on the validation pages"):
        run_predict(run, "--adapt-bn", "8", "--views", "auto")


@pytest.mark.usefixtures("few_pages_suffice")
def test_views_and_statistics_are_tried_together(run: RunPaths) -> None:
    run_predict(run, "--views", "auto", "--adapt-bn", "auto")
    assert all(read_views(run.views(fold, prior)).info.views == NAMES for fold in range(2) for prior in (None, *PRIORS))
    scores = json.loads(run.views_record.read_text())["scores"]
    assert len(scores) == len(NAMES) - 1 + len(PRIORS)
    run_predict(run, "--views", "rot90,id", "--adapt-bn", "auto")
    assert json.loads(run.views_record.read_text())["plain"] == {"views": ["rot90", "id"], "prior": None}


def test_statistics_are_not_tried_with_too_few_pages(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run_predict(run, "--adapt-bn", "auto")
    message = "--adapt-bn auto: BatchNorm statistics stay those of the training: 3 pages of the smallest fold, or to"
    assert message in capsys.readouterr().out
    assert not run.views(0).exists() and not run.views_record.exists() and run.results.submission.exists()
    with pytest.raises(UserError, match=r"--adapt-bn: 3 pages to predict say too little; at least 32 are needed"):
        run_predict(run, "--adapt-bn", "64")


@pytest.mark.usefixtures("few_pages_suffice")
def test_statistics_are_not_tried_if_clean_pages_selected_the_epochs(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    for fold in range(2):
        predictions = read_predictions(run.predictions(fold))
        info = dataclasses.replace(predictions.info, selected_by="clean")
        write_predictions(run.predictions(fold), dataclasses.replace(predictions, info=info))
    run_predict(run, "--adapt-bn", "auto")
    assert "the run's epochs were not selected on damaged pages (valid.damage, valid.select)" in capsys.readouterr().out


@pytest.mark.usefixtures("few_pages_suffice")
def test_model_without_batch_norm_keeps_its_statistics(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oof_views, "has_batch_norm", lambda state_dict: False)
    run_predict(run, "--adapt-bn", "auto")
    assert "model test_resnet has no BatchNorm layers" in capsys.readouterr().out
    with pytest.raises(UserError, match="--adapt-bn: model test_resnet has no BatchNorm layers: predict with --adapt-"):
        run_predict(run, "--adapt-bn", "0")


@pytest.mark.parametrize("value", ["-1", "1.5", "on", ""])
def test_prior_strength_is_a_whole_number(run: RunPaths, value: str) -> None:
    with pytest.raises(UserError, match=f"--adapt-bn: '{value}' is not allowed: auto, off, or"):
        run_predict(run, f"--adapt-bn={value}")

"""Prediction: submissions keep the sample's columns, IDs and order."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from doccls.config import Config
from doccls.data.table import read_table
from doccls.errors import UserError
from doccls.model.build import build_model
from doccls.oof.adjust import learn_adjustment, read_own_predictions
from doccls.oof.merge import load_merged
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, read_predictions, write_predictions
from doccls.oof.thresholds import shift
from doccls.predict import add_arguments, predict
from doccls.prediction.pages import read_sample_pages
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import BestWeights, write_best

MakeConfig = Callable[..., Config]
MakeData = Callable[..., Path]
CLASSES = ("2", "10", "x,y")
COLUMNS = tuple(f"prob_{label}" for label in CLASSES)


# --- the test pages --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(make_data: MakeData, make_config: MakeConfig) -> Config:
    make_data(
        ["z.jpg", "007", "NA", "b"], ["0"] * 4, ["z.jpg", "007.jpg", "NA.jpg", "b.jpg"], None, "sample.csv", "test"
    )
    make_data(["t0", "t1", "t2", "t3"], ["2", "10", "2", "x,y"])
    return make_config(
        data={"sample_csv": "sample.csv", "image_dir_test": "test", "folds": 2, "num_workers": 0},
        model={"name": "test_resnet", "pretrained": False},
        train={"img_size": 32, "batch_size": 3, "amp": False, "cpu_threads": 1},
    )


def test_test_pages_keep_order_of_sample(config: Config, tmp_path: Path) -> None:
    pages = read_sample_pages(config)
    assert tuple(pages.ids) == ("z.jpg", "007", "NA", "b")
    assert tuple(pages.paths) == tuple(tmp_path / "test" / name for name in ("z.jpg", "007.jpg", "NA.jpg", "b.jpg"))
    assert pages.problems == ()


def test_all_missing_and_bad_test_images_are_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "test" / "007.jpg").unlink()
    (tmp_path / "test" / "b.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        read_sample_pages(config)
    message = str(caught.value)
    assert "'007'" in message and f"tried {tmp_path}/test/007{{.jpg,.jpeg,.png," in message
    assert str(tmp_path / "test" / "b.jpg") in message and "--on-bad-image skip" in message
    skip = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_image": "skip"})})
    pages = read_sample_pages(skip)
    assert tuple(pages.ids) == ("z.jpg", "007", "NA", "b")
    assert [path is None for path in pages.paths] == [False, True, False, True]
    assert len(pages.problems) == 2


def test_ids_outside_folder_are_rejected_even_if_bad_images_are_skipped(config: Config, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("ID,target\n../train/t0,0\n")
    skip = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_image": "skip"})})
    with pytest.raises(UserError, match="leave the image folder"):
        read_sample_pages(skip)


def test_missing_sample_folder_and_id_column_are_reported_by_key(config: Config, tmp_path: Path) -> None:
    bare = config.model_copy(
        update={"data": config.data.model_copy(update={"sample_csv": None, "image_dir_test": None})}
    )
    with pytest.raises(UserError, match=r"data.sample_csv: not set\ndata.image_dir_test: not set"):
        read_sample_pages(bare)
    (tmp_path / "sample.csv").write_text("image,target\na,0\n")
    with pytest.raises(UserError, match=r"no such column: data.id_col = 'ID'; .* has: 'image', 'target'"):
        read_sample_pages(config)


# --- predictions of a tiny model -------------------------------------------------------------------------------------


@pytest.fixture
def run(config: Config, tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "runs" / "v1-abc")
    for fold in range(2):
        torch.manual_seed(fold)
        model = build_model(config.model, 3, 32)
        write_best(
            paths.best_checkpoint(fold),
            BestWeights(
                {name: value.clone() for name, value in model.state_dict().items()},
                "fingerprint", fold, 1, 0.5, "raw", CLASSES, (0.5,) * 3, (0.25,) * 3, "no",
                config.model_dump(mode="json", exclude={"provenance"}),
            ),
        )  # fmt: skip
    return paths


def run_predict(*args: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return predict(parser.parse_args(args))


def compute_expected(config: Config, run: RunPaths) -> np.ndarray:
    """Return the mean over folds of the probabilities, computed page by page."""
    from doccls.data.images import decode_image, fit_page
    from doccls.training.checkpoint import read_best

    probs = []
    for fold in range(2):
        best = read_best(run.best_checkpoint(fold))
        model = build_model(config.model, 3, 32).eval()
        model.load_state_dict(best.state_dict)
        rows = []
        for path in read_sample_pages(config).paths:
            assert path is not None
            page = fit_page(decode_image(path.read_bytes(), 10**8), 32).astype(np.float32) / 255
            pixels = torch.from_numpy((page - 0.5) / 0.25).permute(2, 0, 1)[None]
            with torch.no_grad():
                rows.append(model(pixels)[0].numpy())
        probs.append(probabilities(np.stack(rows)))
    mean: np.ndarray = np.mean(probs, axis=0)
    return mean


def test_both_files_hold_mean_over_folds(config: Config, run: RunPaths) -> None:
    assert run_predict(str(run.root)) == 0
    probs = np.load(run.results.test_probabilities)
    assert probs.dtype == np.float32 and probs.shape == (4, 3)
    expected = compute_expected(config, run)
    np.testing.assert_allclose(probs, expected, atol=1e-4)
    table = read_table(run.results.submission, "x", ["ID", "target"])
    assert table.columns == ("ID", "target") and table.cells["ID"] == ["z.jpg", "007", "NA", "b"]
    assert table.cells["target"] == [CLASSES[best] for best in expected.argmax(axis=1)]


def test_skipped_page_gets_class_frequencies_and_keeps_row(
    config: Config, run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(str(run.root))
    complete = np.load(run.results.test_probabilities)
    (tmp_path / "test" / "007.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"007\.jpg"):
        run_predict(str(run.root))
    before = run.results.submission.read_bytes()
    with pytest.raises(UserError, match=r"more complete .*\(usable images: 3 instead of 4\): rename or delete it"):
        run_predict(str(run.root), "--on-bad-image", "skip")
    assert run.results.submission.read_bytes() == before
    run.results.submission.unlink()
    assert run_predict(str(run.root), "--on-bad-image", "skip") == 0
    probs = np.load(run.results.test_probabilities)
    np.testing.assert_allclose(probs[1], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(probs[[0, 2, 3]], complete[[0, 2, 3]], atol=1e-5)
    assert "007.jpg" in capsys.readouterr().out


def test_sample_and_folder_can_be_replaced(config: Config, run: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("target,ID\n0,t1\n0,t0\n")
    assert (
        run_predict(str(run.root), "--sample-csv", str(tmp_path / "other.csv"), "--image-dir", str(tmp_path / "train"))
        == 0
    )
    assert read_table(run.results.submission, "x", ["ID"]).cells["ID"] == ["t1", "t0"]


# --- calibration -----------------------------------------------------------------------------------------------------


def write_oof(run: RunPaths, folds: tuple[int, ...] = (0, 1), bias: float = 0.0, count: int = 200) -> np.ndarray:
    """Write fold predictions whose logits claim three times too much, and prefer the last class by `bias`.

    Return the logits of these folds.
    """
    rng = np.random.default_rng(0)
    targets, fold_of = rng.integers(0, 3, count), np.arange(count) % 2
    evidence = rng.normal(0, 1, (count, 3)) + 2 * np.eye(3)[targets]
    logits = (3 * (2 * evidence + bias * np.eye(3)[2])).astype(np.float32)
    for fold in folds:
        rows = np.flatnonzero(fold_of == fold)
        info = PredictionsInfo("fingerprint", fold, 2, count, CLASSES, tuple(map(str, rows)), (), 1, 0.5)
        write_predictions(run.predictions(fold), FoldPredictions(info, rows, logits[rows], targets[rows]))
    return logits[np.isin(fold_of, folds)]


def test_probabilities_are_calibrated_after_averaging_and_labels_stay(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_predict(str(run.root)) == 0
    assert "[WARNING] probabilities are not calibrated: no finished fold has predictions" in capsys.readouterr().out
    plain, labels = np.load(run.results.test_probabilities).astype(float), run.results.submission.read_bytes()
    write_oof(run)
    assert run_predict(str(run.root)) == 0
    out = capsys.readouterr().out
    temperature = load_merged(run)[1].calibration["clean"].temperature
    assert 2 < temperature < 4
    assert (
        f"[PREDICT] temperature={temperature:.3f} calibrates the probabilities and changes no label "
        "(from OOF predictions of clean pages, folds 0, 1 of 2)"
    ) in out
    assert "not calibrated" not in out and "thresholds" not in out
    expected = plain ** (1 / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(run.results.test_probabilities), expected, rtol=1e-5)
    assert np.abs(expected - plain).max() > 0.01
    assert run.results.submission.read_bytes() == labels


def test_calibrated_probabilities_are_in_the_columns_of_the_submission(run: RunPaths, tmp_path: Path) -> None:
    write_oof(run)
    (tmp_path / "sample.csv").write_text('"x,y",ID,2,10\n0,z.jpg,0,0\n0,007,0,0\n0,NA,0,0\n0,b,0,0\n')
    assert run_predict(str(run.root)) == 0
    cells = read_table(run.results.submission, "x", list(CLASSES)).cells
    written = np.array([[float(value) for value in cells[label]] for label in CLASSES]).T
    np.testing.assert_allclose(written, np.load(run.results.test_probabilities), atol=1e-6)
    np.testing.assert_allclose(written.sum(axis=1), 1, atol=1e-6)


def test_temperature_comes_from_the_folds_that_are_finished(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    logits = write_oof(run, folds=(1,))
    assert len(logits) == 100
    assert run_predict(str(run.root)) == 0
    out = capsys.readouterr().out
    adjustment = learn_adjustment(read_own_predictions(run, "fingerprint", 2)[0])
    assert adjustment is not None and f"[PREDICT] temperature={adjustment.temperature:.3f} " in out
    assert "clean pages, folds 1 of 2)" in out and "[WARNING] fold 0 is not finished" in out


def test_predictions_of_another_run_do_not_calibrate(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_oof(run)
    for fold in range(2):
        predictions = read_predictions(run.predictions(fold))
        info = dataclasses.replace(predictions.info, fingerprint="other")
        write_predictions(run.predictions(fold), dataclasses.replace(predictions, info=info))
    assert run_predict(str(run.root)) == 0
    out = capsys.readouterr().out
    assert out.count("[WARNING] not used for calibration: ") == 2 and "probabilities are not calibrated" in out


def test_class_frequencies_of_a_missing_page_are_not_calibrated(run: RunPaths, tmp_path: Path) -> None:
    write_oof(run)
    (tmp_path / "test" / "007.jpg").write_bytes(b"torn")
    assert run_predict(str(run.root), "--on-bad-image", "skip") == 0
    np.testing.assert_allclose(np.load(run.results.test_probabilities)[1], [0.5, 0.25, 0.25])


def test_thresholds_choose_labels_but_not_those_of_missing_pages(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The OOF logits prefer `x,y`, the class of all test pages, so much that some of these get another label."""
    write_oof(run, bias=2.0, count=600)
    thresholds = load_merged(run)[1].thresholds
    assert thresholds.offsets is not None and thresholds.offsets[2] == min(thresholds.offsets) < 0
    total = np.zeros((4, 3))
    for fold in range(2):
        other = run.best_checkpoint(1 - fold)
        other.rename(other.with_suffix(".away"))
        assert run_predict(str(run.root)) == 0
        total += shift(np.load(run.results.test_probabilities), thresholds.offsets)
        other.with_suffix(".away").rename(other)
        run.results.submission.unlink()
    capsys.readouterr()
    (tmp_path / "test" / "007.jpg").write_bytes(b"torn")
    assert run_predict(str(run.root), "--on-bad-image", "skip") == 0
    assert "[PREDICT] labels are chosen by per-class thresholds on each fold's prob" in capsys.readouterr().out
    probs = np.load(run.results.test_probabilities).astype(float)
    expected = [CLASSES[best] for best in total.argmax(axis=1)]
    expected[1] = "2"  # the most frequent class
    assert read_table(run.results.submission, "x", ["target"]).cells["target"] == expected
    assert expected != [CLASSES[best] for best in probs.argmax(axis=1)]


# --- views -----------------------------------------------------------------------------------------------------------


def draw_test_pages(folder: Path) -> None:
    """Replace the test pages by noise, whose views look different to a network."""
    for number, path in enumerate(sorted(folder.iterdir())):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(path, quality=95)


def test_views_are_averaged_as_probabilities_within_each_fold(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_test_pages(tmp_path / "test")
    write_oof(run)
    alone = []
    for view in ("id", "rot90", "hflip+scale0.9"):
        assert run_predict(str(run.root), "--views", view) == 0
        alone.append(np.load(run.results.test_probabilities).astype(float))
    assert np.abs(alone[0] - alone[1]).max() > 1e-3 and np.abs(alone[0] - alone[2]).max() > 1e-3
    for fold in range(2):
        run.predictions(fold).unlink()  # the views have no OOF predictions, so only `id` was calibrated
    assert run_predict(str(run.root)) == 0
    alone[0] = np.load(run.results.test_probabilities).astype(float)
    capsys.readouterr()
    assert run_predict(str(run.root), "--views", "id, rot90,hflip+scale0.9") == 0
    np.testing.assert_allclose(np.load(run.results.test_probabilities), np.mean(alone, axis=0), atol=1e-6)
    assert "[PREDICT] predicting with views id,rot90,hflip+scale0.9\n" in capsys.readouterr().out
    record = json.loads(run.results.submission_record.read_text())
    assert record["views"] == ["id", "rot90", "hflip+scale0.9"] and record["folds"] == [0, 1]


def test_view_is_that_of_the_turned_files(run: RunPaths, tmp_path: Path) -> None:
    draw_test_pages(tmp_path / "test")
    for path in (tmp_path / "test").iterdir():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    (tmp_path / "sample.csv").write_text("ID,target\nz.png,0\n007,0\nNA,0\nb,0\n")
    assert run_predict(str(run.root), "--views", "rot90") == 0
    seen = np.load(run.results.test_probabilities)
    for path in (tmp_path / "test").iterdir():
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    assert run_predict(str(run.root)) == 0
    np.testing.assert_allclose(np.load(run.results.test_probabilities), seen, atol=1e-6)


def test_views_none_and_id_give_the_bytes_of_no_option(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_oof(run)
    files = (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    assert run_predict(str(run.root)) == 0
    plain, out = [path.read_bytes() for path in files], capsys.readouterr().out.split("[PREDICT] ")[1:]
    assert "views" not in "".join(out).replace(str(run.root), "") and "views" not in json.loads(
        run.results.submission_record.read_text()
    )
    for views in ("none", "id"):
        assert run_predict(str(run.root), "--views", views) == 0
        assert [path.read_bytes() for path in files] == plain
        assert capsys.readouterr().out.split("[PREDICT] ")[1:] == out


def test_views_without_oof_predictions_of_them_are_not_calibrated(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    write_oof(run)
    assert run_predict(str(run.root), "--views", "id,hflip") == 0
    out = capsys.readouterr().out
    assert "[WARNING] probabilities are not calibrated" in out and "temperature=" not in out


def test_wrong_view_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--views: no view 'flip': allowed are auto, none"):
        run_predict(str(tmp_path / "gone"), "--views", "id,flip")


def test_views_of_a_blend_are_refused(run: RunPaths) -> None:
    run.blend.write_text("{}")
    with pytest.raises(
        UserError, match=r"--views id,hflip --adapt-bn off: .*v1-abc is a blend, and these options are for single runs"
    ):
        run_predict(str(run.root), "--views", "id,hflip")


# --- a folder of images, and certainty -------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Return a folder with four images, two of them the same, in subfolders, and with other files."""
    folder = tmp_path / "scans"
    (folder / "b" / ".hidden").mkdir(parents=True)
    for number, name in enumerate(("z.JPG", "b/a.png", "b/c.jpg")):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / name)
    (folder / "b" / "b.png").write_bytes((folder / "b" / "a.png").read_bytes())
    for name in ("._z.JPG", "notes.txt", "b/.hidden/d.png"):
        (folder / name).write_bytes(b"x")
    return folder


def test_all_images_of_a_folder_are_predicted_without_any_csv(
    config: Config, run: RunPaths, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sample.csv").unlink()
    shutil.rmtree(tmp_path / "test")
    assert run_predict(str(run.root), "--images", str(scans), "--probabilities") == 0
    assert f"[PREDICT] 4 images of {scans} x 2 folds" in capsys.readouterr().out
    results = run.root / "predictions" / "scans"
    assert sorted(path.name for path in results.iterdir()) == ["predictions.csv", "predictions.json"]
    cells = read_table(results / "predictions.csv", "x", ["ID", "prediction", "confidence", *COLUMNS]).cells
    assert cells["ID"] == ["b/a.png", "b/b.png", "b/c.jpg", "z.JPG"]
    probs = np.array([[float(cell) for cell in cells[column]] for column in COLUMNS]).T
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(probs[0], probs[1])
    assert cells["prediction"] == [CLASSES[best] for best in probs.argmax(axis=1)]
    assert [float(cell) for cell in cells["confidence"]] == probs.max(axis=1).tolist()
    (tmp_path / "sample.csv").write_text("ID,target\nz.JPG,0\nb/c.jpg,0\n")
    assert run_predict(str(run.root), "--image-dir", str(scans)) == 0
    np.testing.assert_allclose(np.load(run.results.test_probabilities), probs[[3, 2]], atol=1e-5)


def test_links_in_a_folder_are_followed_but_not_round_and_round(run: RunPaths, scans: Path, tmp_path: Path) -> None:
    (scans / "loop").symlink_to(scans)
    (tmp_path / "elsewhere").mkdir()
    (scans / "b" / "c.jpg").rename(tmp_path / "elsewhere" / "c.jpg")
    (scans / "link").symlink_to(tmp_path / "elsewhere")
    assert run_predict(str(run.root), "--images", str(scans), "--output", str(tmp_path / "out")) == 0
    cells = read_table(tmp_path / "out" / "predictions.csv", "x", ["ID"]).cells
    assert cells["ID"] == ["b/a.png", "b/b.png", "link/c.jpg", "z.JPG"]
    assert not (run.root / "predictions").exists()


def test_bad_image_of_a_folder_has_no_prediction_and_is_reviewed(
    run: RunPaths, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scans / "b" / "b.png").write_bytes(b"torn")
    (tmp_path / "train.csv").unlink()  # the training data is not needed
    with pytest.raises(UserError, match=r"b\.png(.|\n)*skip would leave their rows without a prediction"):
        run_predict(str(run.root), "--images", str(scans))
    assert not (run.root / "predictions").exists()
    arguments = ("--images", str(scans), "--on-bad-image", "skip", "--min-confidence", "0.99")
    assert run_predict(str(run.root), *arguments) == 0
    results = run.root / "predictions" / "scans"
    assert f"{results}/review.csv: 4 of 4 pages to review, with a confidence below 0.99 or" in capsys.readouterr().out
    cells = read_table(results / "predictions.csv", "x", ["ID", "prediction", "confidence"]).cells
    assert [cell == "" for cell in cells["prediction"]] == [False, True, False, False]
    review = read_table(results / "review.csv", "x", ["ID", "confidence"]).cells
    assert review["ID"][0] == "b/b.png"
    confidence = [float(cell) for cell in review["confidence"][1:]]
    assert confidence == sorted(confidence) and confidence[0] == min(map(float, filter(None, cells["confidence"])))


def test_submission_comes_with_predictions_and_pages_to_review(run: RunPaths, tmp_path: Path) -> None:
    write_oof(run)
    (tmp_path / "test" / "007.jpg").write_bytes(b"torn")
    assert run_predict(str(run.root), "--on-bad-image", "skip", "--min-confidence", "0") == 0
    cells = read_table(run.results.predictions, "x", ["ID", "prediction", "confidence"]).cells
    labels = read_table(run.results.submission, "x", ["target"]).cells["target"]
    assert cells["ID"] == ["z.jpg", "007", "NA", "b"]
    assert cells["prediction"] == [labels[0], "", *labels[2:]]
    probs = np.load(run.results.test_probabilities)
    np.testing.assert_allclose(list(map(float, filter(None, cells["confidence"]))), probs[[0, 2, 3]].max(1), atol=1e-6)
    assert read_table(run.results.review, "x", ["ID"]).cells["ID"] == ["007"]


def test_output_takes_all_results_of_a_submission(run: RunPaths, tmp_path: Path) -> None:
    assert run_predict(str(run.root), "--output", str(tmp_path / "out")) == 0
    names = ["predictions.csv", "predictions.json", "submission.csv", "submission.json", "test_probabilities.npy"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert not run.results.submission.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "gone"), "--images: no such folder"),
        (("--images", "."), "--images: no images in .*extensions: .jpg"),
        (("--images", ".", "--sample-csv", "x"), "--sample-csv can't be used with it"),
        (("--images", ".", "--image-dir", "."), "--image-dir can't be used with it"),
        (("--output", "file/x"), "--output: no such folder: .* is a file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("file").write_text("")
    with pytest.raises(UserError, match=message):
        run_predict(str(run.root), *arguments)


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "x"])
def test_min_confidence_is_a_probability(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_predict("run", f"--min-confidence={value}")
    assert f"argument --min-confidence: '{value}' is not a probability: it must be a" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_refused(run: RunPaths, scans: Path) -> None:
    (scans / "b" / "a.png").rename(os.fsdecode(os.fsencode(scans) + b"/b/\xff.png"))
    with pytest.raises(UserError, match=r"names that are not UTF-8 text; rename: 1\n +'b/\\udcff\.png'"):
        run_predict(str(run.root), "--images", str(scans))


def test_results_of_another_run_are_not_replaced(run: RunPaths, scans: Path, tmp_path: Path) -> None:
    arguments = ("--images", str(scans), "--output", str(tmp_path / "out"))
    run_predict(str(run.root), *arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    from doccls.training.checkpoint import read_best

    for fold in range(2):
        best = read_best(run.best_checkpoint(fold))
        write_best(run.best_checkpoint(fold), dataclasses.replace(best, fingerprint="other"))
    with pytest.raises(UserError, match="out has the predictions of another run: choose another folder by --output"):
        run_predict(str(run.root), *arguments)
    assert {path: path.read_bytes() for path in before} == before


def test_pages_with_logits_that_are_not_finite_are_refused_by_id(config: Config, run: RunPaths, scans: Path) -> None:
    from doccls.training.checkpoint import read_best

    best = read_best(run.best_checkpoint(1))
    best.state_dict["fc.bias"][0] = torch.inf
    write_best(run.best_checkpoint(1), best)
    with pytest.raises(UserError, match=r"fold 1: logits are not finite, of pages: 4\n +ID 'b/a.png'"):
        run_predict(str(run.root), "--images", str(scans))
    with pytest.raises(UserError, match=r"not finite \(predict without --views and --adapt-bn\), of pages: 4"):
        run_predict(str(run.root), "--images", str(scans), "--views", "rot90")
    assert not (run.root / "predictions").exists()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_run_and_missing_checkpoint_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        run_predict(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no checkpoint"):
        run_predict(str(tmp_path))


def test_checkpoints_of_different_runs_are_rejected(run: RunPaths) -> None:
    from doccls.training.checkpoint import read_best

    write_best(run.best_checkpoint(1), dataclasses.replace(read_best(run.best_checkpoint(1)), fingerprint="other"))
    with pytest.raises(UserError, match="belong to different runs"):
        run_predict(str(run.root))
    assert not run.results.submission.exists()


def test_folds_without_checkpoint_cause_warning(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run.best_checkpoint(1).unlink()
    run_predict(str(run.root))
    assert "1 of 2 folds have a checkpoint" in capsys.readouterr().out


def test_files_that_a_killed_process_had_moved_aside_are_back(run: RunPaths) -> None:
    checkpoint = run.best_checkpoint(0)
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.0123abcd-0a1b.old.tmp"))
    assert run_predict(str(run.root)) == 0
    assert checkpoint.exists() and not list(checkpoint.parent.glob(".*"))


def test_partial_prediction_never_replaces_complete_one(run: RunPaths, tmp_path: Path) -> None:
    run_predict(str(run.root))
    files = {
        path: path.read_bytes()
        for path in (run.results.submission, run.results.test_probabilities, run.results.submission_record)
    }
    sample = (tmp_path / "sample.csv").read_text()
    for text, reason in (
        ("ID,target\n", "sample.csv: no rows"),
        (sample.rsplit("b,", 1)[0], "rows: 3 instead of 4"),
    ):
        (tmp_path / "sample.csv").write_text(text)
        with pytest.raises(UserError, match=reason):
            run_predict(str(run.root))
    (tmp_path / "sample.csv").write_text(sample)
    run.best_checkpoint(1).unlink()
    with pytest.raises(UserError, match="folds: 1 instead of 2"):
        run_predict(str(run.root))
    assert {path: path.read_bytes() for path in files} == files


def test_prediction_without_any_usable_image_is_refused(run: RunPaths, tmp_path: Path) -> None:
    for path in (tmp_path / "test").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 4 images can be used"):
        run_predict(str(run.root), "--on-bad-image", "skip")
    assert not run.results.submission.exists()


def test_unknown_choice_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_predict("run", "--on-bad-image", "maybe")


def test_nothing_is_written_if_sample_columns_are_wrong(run: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("ID,a,b\nz.jpg,0,0\n")
    with pytest.raises(UserError):
        run_predict(str(run.root))
    assert not run.results.submission.exists()


@pytest.mark.parametrize(
    ("precision", "supported", "warned"), [("bf16", True, False), ("bf16", False, True), ("no", True, False)]
)
def test_prediction_uses_validation_precision_if_device_supports_it(
    run: RunPaths,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    supported: bool,
    warned: bool,
) -> None:
    from doccls.training import distributed
    from doccls.training.checkpoint import read_best

    for fold in range(2):
        path = run.best_checkpoint(fold)
        write_best(path, dataclasses.replace(read_best(path), precision=precision))
    used: list[bool | str] = []
    start = distributed.start_processes
    monkeypatch.setattr(distributed, "start_processes", lambda config: used.append(config.train.amp) or start(config))
    monkeypatch.setattr(distributed, "can_compute_in", lambda precision: supported)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert run_predict(str(run.root)) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert used == [precision if supported and precision != "no" else False]
    assert ("[WARNING] validated in bf16, which this device does not" in capsys.readouterr().out) == warned


# --- blends ----------------------------------------------------------------------------------------------------------


def write_member(paths: RunPaths, config: Config, seed: int, **changes: str) -> RunPaths:
    """Write the checkpoints of a run with two folds."""
    for fold in range(2):
        torch.manual_seed(10 * seed + fold)
        model = build_model(config.model, 3, config.train.img_size)
        best = BestWeights(
            {name: value.clone() for name, value in model.state_dict().items()},
            f"fingerprint{seed}", fold, 1, 0.5, "raw", CLASSES, (0.5,) * 3, (0.25,) * 3, "no",
            config.model_dump(mode="json", exclude={"provenance"}),
        )  # fmt: skip
        write_best(paths.best_checkpoint(fold), dataclasses.replace(best, **changes))  # type: ignore[arg-type]
    return paths


def resize(config: Config, size_px: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"img_size": size_px})})


@pytest.fixture
def members(config: Config, tmp_path: Path) -> list[RunPaths]:
    """Write three runs, two of them with other image sizes."""
    return [
        write_member(RunPaths(tmp_path / "runs" / f"v{seed}"), resize(config, size_px), seed)
        for seed, size_px in ((1, 32), (2, 48), (3, 40))
    ]


def write_blend(
    members: list[RunPaths],
    weights: tuple[float, ...],
    temperature: float = 1.0,
) -> RunPaths:
    paths = RunPaths(members[0].root.parent / "blend-abc")
    recorded = [
        {"path": f"../{member.run_id}", "fingerprint": f"fingerprint{seed}", "weight": weight,
         "macro_f1": 0.5, "macro_f1_damaged": None}
        for seed, (member, weight) in enumerate(zip(members, weights, strict=True), 1)
    ]  # fmt: skip
    paths.root.mkdir(parents=True, exist_ok=True)
    record = {"format": "doccls-blend-1", "members": recorded, "decided_by": "clean", "folds": [0, 1]}
    paths.blend.write_text(json.dumps(record | {"temperature": temperature}))
    return paths


def test_blend_averages_its_members_by_weight(members: list[RunPaths], capsys: pytest.CaptureFixture[str]) -> None:
    for member in members:
        run_predict(str(member.root))
    own = [np.load(member.results.test_probabilities).astype(np.float64) for member in members]
    paths = write_blend(members, (0.75, 0.25, 0))
    shutil.rmtree(members[2].root)  # without weight, it is not needed
    capsys.readouterr()
    assert run_predict(str(paths.root)) == 0
    out = capsys.readouterr().out
    assert "[PREDICT] 4 test images x 4 folds of 2 runs\n" in out and "[WARNING] v2: fold 1 is not finished" in out
    assert "[PREDICT] run=v1 weight=0.75\n[PREDICT] fold=0 " in out and "run=v3" not in out
    probs = np.load(paths.results.test_probabilities)
    expected = 0.75 * own[0] + 0.25 * own[1]
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    assert np.abs(own[0] - own[1]).max() > 1e-3, "the members must differ"
    table = read_table(paths.results.submission, "x", ["ID", "target"])
    assert table.cells["target"] == [CLASSES[best] for best in expected.argmax(axis=1)]
    assert json.loads(paths.results.submission_record.read_text())["folds"] == [0, 1, 0, 1]
    members[1].best_checkpoint(1).unlink()
    with pytest.raises(UserError, match="folds: 3 instead of 4"):
        run_predict(str(paths.root))


def test_blend_with_all_weight_on_a_run_gives_the_bytes_of_that_run(members: list[RunPaths]) -> None:
    run_predict(str(members[1].root))
    paths = write_blend(members, (0, 1, 0))
    run_predict(str(paths.root))
    for name in ("submission", "test_probabilities", "submission_record"):
        assert getattr(paths.results, name).read_bytes() == getattr(members[1].results, name).read_bytes()


def test_blend_is_calibrated_by_its_own_temperature(
    members: list[RunPaths], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_blend(members, (0.5, 0.5, 0))
    run_predict(str(plain.root))
    probs = np.load(plain.results.test_probabilities).astype(np.float64)
    paths = write_blend(members, (0.5, 0.5, 0), temperature=2.0)
    capsys.readouterr()
    run_predict(str(paths.root))
    assert "[PREDICT] temperature=2.000 " in capsys.readouterr().out
    expected = np.sqrt(probs) / np.sqrt(probs).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(paths.results.test_probabilities), expected, atol=1e-6)
    labels = read_table(paths.results.submission, "x", ["ID", "target"]).cells["target"]
    assert labels == [CLASSES[best] for best in probs.argmax(axis=1)]


def test_skipped_page_of_a_blend_gets_class_frequencies(members: list[RunPaths], tmp_path: Path) -> None:
    (tmp_path / "test" / "007.jpg").write_bytes(b"torn")
    paths = write_blend(members, (0.5, 0.25, 0.25))
    run_predict(str(paths.root), "--on-bad-image", "skip")
    np.testing.assert_allclose(np.load(paths.results.test_probabilities)[1], [0.5, 0.25, 0.25])


def test_blend_and_runs_can_be_moved_together(members: list[RunPaths], tmp_path: Path) -> None:
    paths = write_blend(members, (0.5, 0.5, 0))
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert run_predict(str(tmp_path / "moved" / paths.run_id)) == 0


def test_members_that_moved_or_changed_are_refused_by_name(
    config: Config, members: list[RunPaths], tmp_path: Path
) -> None:
    paths = write_blend(members, (0.5, 0.5, 0))
    write_member(members[1], resize(config, 48), 2, fingerprint="trained again")
    with pytest.raises(UserError, match=r"v2 is another run .*\(fingerprint trained agai instead of fingerprint2\)"):
        run_predict(str(paths.root))
    members[1].root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"member \.\./v2: no such run folder.*move it back"):
        run_predict(str(paths.root))
    assert not paths.results.submission.exists()


def test_members_with_other_test_images_need_an_option(config: Config, members: list[RunPaths], tmp_path: Path) -> None:
    data = config.data.model_copy(update={"sample_csv": tmp_path / "other.csv"})
    write_member(members[1], config.model_copy(update={"data": data}), 2)
    paths = write_blend(members, (0.5, 0.5, 0))
    with pytest.raises(UserError, match=r"differ in data\.sample_csv \(v1: .*: choose it by --sample-csv"):
        run_predict(str(paths.root))
    assert run_predict(str(paths.root), "--sample-csv", str(tmp_path / "sample.csv")) == 0


def test_members_of_different_precisions_are_predicted_in_float32(
    config: Config, members: list[RunPaths], capsys: pytest.CaptureFixture[str]
) -> None:
    write_member(members[1], resize(config, 48), 2, precision="bf16")
    run_predict(str(write_blend(members, (0.5, 0.5, 0)).root))
    out = capsys.readouterr().out
    assert "different precisions (v1: no, v2: bf16): predicting in float32" in out and "does not support" not in out


def test_members_of_a_blend_read_a_folder_in_the_same_way(members: list[RunPaths], scans: Path) -> None:
    """One member would refuse pages that the other accepts."""
    from doccls.training.checkpoint import parse_config, read_best

    for fold in range(2):
        best = read_best(members[1].best_checkpoint(fold))
        config = parse_config(best)
        data = config.data.model_copy(update={"max_image_pixels": 10, "sample_csv": Path("/gone.csv")})
        changed = config.model_copy(update={"data": data}).model_dump(mode="json", exclude={"provenance"})
        write_best(members[1].best_checkpoint(fold), dataclasses.replace(best, config=changed))
    paths = write_blend(members, (0.5, 0.5, 0))
    assert run_predict(str(paths.root), "--images", str(scans)) == 0
    cells = read_table(paths.root / "predictions" / "scans" / "predictions.csv", "x", ["ID", "prediction"]).cells
    assert all(cells["prediction"])

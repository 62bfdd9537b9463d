"""`doccls report`: it writes one file, or says in words why it can't."""

from __future__ import annotations

import argparse
import csv
import json
import os
import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest

from doccls import blend
from doccls.errors import UserError
from doccls.report.command import add_arguments, report
from doccls.report.make import MARK
from doccls.run.paths import RunPaths
from tests.unit.report_runs import COUNT, IDS, write_run


def run_report(*args: Path | str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return report(parser.parse_args([str(arg) for arg in args]))


def refuse(*args: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        run_report(*args)
    return str(caught.value)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return write_run(tmp_path)


def test_report_is_written_into_the_run_and_again_with_the_same_bytes(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in paths.root.rglob("*") if path.is_file()}
    assert run_report(paths.root) == 0
    html = paths.report.read_bytes()
    assert paths.report == paths.root / "report.html" and html[:1024].count(MARK.encode()) == 1
    assert capsys.readouterr().out.endswith(f"MiB: {paths.report}\n")
    assert run_report(paths.root) == 0 and paths.report.read_bytes() == html
    assert {path: path.read_bytes() for path in paths.root.rglob("*") if path.is_file()} == before | {
        paths.report: html
    }


def test_no_images_leaves_out_thumbnails(paths: RunPaths, tmp_path: Path) -> None:
    output = tmp_path / "confidential.html"
    assert run_report(paths.root, "--no-images", "--output", output) == 0
    assert '"thumbnails":{}' in output.read_text() and not paths.report.exists()
    run_report(paths.root)
    assert '"thumbnails":{}' not in paths.report.read_text()


def test_missing_images_only_leave_out_thumbnails(
    paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train" / IDS[3]).unlink()
    assert run_report(paths.root) == 0
    note = f"1 of {COUNT} pages have no thumbnail: their images can't be read"
    assert f"[WARNING] {note}" in capsys.readouterr().out and note in paths.report.read_text().replace("&#39;", "'")
    paths.snapshot.unlink()
    assert run_report(paths.root) == 0
    assert "which says where the images are, is missing" in paths.report.read_text()


def test_blend_has_a_report_without_curves(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=seed).root for seed in (1, 2)]
    parser = argparse.ArgumentParser()
    blend.add_arguments(parser)
    blend.blend(parser.parse_args([*map(str, runs), "--run-id", "both"]))
    folder = RunPaths(runs[0].parent / "both")
    assert run_report(folder.root) == 0
    html = folder.report.read_text()
    assert "Runs of the blend" in html and 'id="curves"' not in html and 'id="config"' not in html
    assert '"thumbnails":{}' not in html and "doccls preview" not in html
    kept = folder.oof_csv.read_text()
    folder.oof_csv.write_text(f'{kept}"{"x" * 2_000}')
    limit = csv.field_size_limit(1_000)
    assert "damaged: blend the members again" in refuse(folder.root)
    csv.field_size_limit(limit)
    folder.oof_csv.write_text(kept)
    folder.oof_logits.write_bytes(b"")
    assert "damaged: blend the members again" in refuse(folder.root)


def test_run_that_is_not_merged_has_the_same_report(paths: RunPaths) -> None:
    run_report(paths.root)
    html = paths.report.read_bytes()
    paths.summary.unlink()
    run_report(paths.root)
    assert paths.report.read_bytes() == html


def test_scores_of_an_earlier_merge_are_not_shown(paths: RunPaths) -> None:
    run_report(paths.root)
    shown = paths.report.read_bytes()
    paths.summary.write_text(paths.summary.read_text().replace('"macro_f1": 0.', '"macro_f1": 0.00', 1))
    assert "summary.json: it is about other predictions: merge the run" in refuse(paths.root)
    os.utime(paths.predictions(1), ns=(2**62, 2**62))
    run_report(paths.root)
    assert paths.report.read_bytes() == shown


def test_report_of_some_folds_is_about_their_pages_only(paths: RunPaths) -> None:
    paths.predictions(1).unlink()
    run_report(paths.root)
    html = paths.report.read_text()
    assert "Not finished: fold 1 of 3." in html and "2 of 3" in html and "data.valid_fold=all" in html
    shown = json.loads(html.partition('id="data">')[2].partition("</script>")[0])["pages"]
    assert sorted(page[1] for page in shown) == [*IDS[:10], *IDS[20:]]


def test_run_without_finished_folds_is_refused(paths: RunPaths) -> None:
    for fold in range(3):
        paths.predictions(fold).unlink()
    assert "no fold of this run has finished" in refuse(paths.root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: '{"num_samples": 3}',
        lambda text: text.replace('"macro_f1": 0.', '"macro_f1": "0.'),
        lambda text: text.replace('"num_samples": 30', '"num_samples": null'),
        lambda text: text.replace('"notes": []', '"notes": "none"'),
    ],
)
def test_damaged_summary_is_refused(paths: RunPaths, damage: Callable[[str], str]) -> None:
    paths.summary.write_text(damage(paths.summary.read_text()))
    assert "summary.json: damaged, or another version of doccls wrote it" in refuse(paths.root)


def test_damaged_lines_of_metrics_are_left_out(paths: RunPaths) -> None:
    text = paths.fold_metrics(0).read_text()
    paths.fold_metrics(0).write_text(text.replace('"time_s": 1.0', '"time_s": "1"'))
    run_report(paths.root)
    assert "fold 1: " in paths.report.read_text() and "fold 0: " not in paths.report.read_text()


def test_only_earlier_reports_are_replaced(paths: RunPaths, tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    assert "exists and is not an earlier report" in refuse(paths.root, "--output", other)
    assert "must end in .html" in refuse(paths.root, "--output", tmp_path / "report.pdf")
    assert "nowhere" in refuse(paths.root, "--output", tmp_path / "nowhere" / "report.html")
    assert other.read_text() == "<p>mine</p>"


def test_open_starts_the_browser(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(opened.append(url)))
    run_report(paths.root, "--open")
    assert opened == [paths.report.as_uri()] and "--open: no browser could be started" in capsys.readouterr().out


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_several_runs_give_a_comparison_in_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (1, 2, 3)]
    assert run_report(*(paths.root for paths in runs)) == 0
    output = runs[0].root / "compare_tiny2+tiny3.html"
    html = output.read_bytes()
    assert html[:1024].count(MARK.encode()) == 1 and b'"thumbnails":{"' in html
    assert capsys.readouterr().out.endswith(f"MiB: {output}\n")
    assert run_report(*(paths.root for paths in runs)) == 0 and output.read_bytes() == html
    assert not any(paths.report.exists() for paths in runs) and not list(runs[1].root.glob("*.html"))
    other = tmp_path / "other.html"
    assert run_report(runs[0].root, runs[1].root, "--no-images", "--output", other) == 0
    assert b'"thumbnails":{}' in other.read_bytes()


def test_run_is_compared_with_a_blend(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=seed).root for seed in (1, 2)]
    parser = argparse.ArgumentParser()
    blend.add_arguments(parser)
    blend.blend(parser.parse_args([*map(str, runs), "--run-id", "both"]))
    for first, other in ((runs[0], runs[0].parent / "both"), (runs[0].parent / "both", runs[0])):
        assert run_report(first, other) == 0
        html = (first / f"compare_{other.name}.html").read_text()
        assert "is a blend, which has no config of its own" in html and "Damaged copies" in html
        assert '"thumbnails":{"' in html and "doccls blend" not in html[html.index('id="next"') :]


def test_runs_on_other_rows_and_unfinished_ones_are_refused(paths: RunPaths, tmp_path: Path) -> None:
    other = write_run(tmp_path, seed=1, ids=[f"other{row}.jpg" for row in range(COUNT)])
    assert "only runs on the same rows, labels and classes can be compared" in refuse(paths.root, other.root)
    assert "is named twice" in refuse(paths.root, paths.root)
    other = write_run(tmp_path, seed=2)
    other.predictions(1).unlink()
    assert "only runs on the same rows, labels and classes can be compared" in refuse(paths.root, other.root)
    assert not list(paths.root.glob("*.html"))

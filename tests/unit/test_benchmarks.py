"""Tables of the benchmarks (medians, spreads, ratios by round), and the measured cost of a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import render_case
from benchmarks.cases import TIMM_RATE, Case
from benchmarks.gpu import LoaderFigures, render_loaders, render_steps
from benchmarks.gpu_steps import Network, StepFigures, measure_steps
from benchmarks.measure import run
from benchmarks.pages import A4_PX, draw_pages, link_for_timm
from doccls.config.schema import TrainConfig
from doccls.data.images import decode_image


def test_ratios_are_computed_by_round() -> None:
    case = Case("x", "what", {"ours": lambda *arguments: {}, "theirs": lambda *arguments: {}}, ("s", "decoded"), 3)
    measured = {"ours": [{"s": 1.0, "decoded": 4.0}, {"s": 30.0, "decoded": 4.0}, {"s": 4.0, "decoded": 4.0}],
                "theirs": [{"s": 2.0}, {"s": 40.0}, {"s": 16.0}]}  # fmt: skip
    assert render_case(case, measured) == [
        "",
        "what (3 rounds, interleaved)",
        "",
        "| | s | decoded |",
        "|---|---|---|",
        "| ours | 4.00 (1.00 to 30.00) | 4.00 (4.00 to 4.00) |",
        "| theirs | 16.0 (2.0 to 40.0) |  |",
        "| ours / theirs | 0.50 (0.25 to 0.75) |  |",
    ]


_ORPHAN = "import os, time; time.sleep(1); sum(range(10**7)); times = os.times(); print(times.user + times.system)"
_MEASURE = f"""
import json, sys
from dataclasses import asdict
from pathlib import Path
from benchmarks.measure import adopt_orphans, run
adopt_orphans()
leave = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_ORPHAN!r}])"
cost = run([sys.executable, "-c", leave], Path.cwd(), {{}}, Path("console.txt"))
print(json.dumps(asdict(cost)))
"""


@pytest.mark.slow
def test_cost_includes_processes_that_survive_their_parents(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    assert cost["cpu_s"] >= float(cost["output"]) - 0.02 > 0, "the kernel counts in hundredths"
    assert cost["wall_s"] > 1


def test_failed_command_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3\nat last"):
        run([sys.executable, "-c", "print('at last'); raise SystemExit(3)"], tmp_path, {}, tmp_path / "console.txt")


@pytest.mark.slow
def test_pages_have_the_layouts_of_doccls_and_timm(tmp_path: Path) -> None:
    draw_pages(tmp_path, 3)
    files = sorted((tmp_path / "train").iterdir())
    assert [decode_image(file.read_bytes(), 10**8).shape[1::-1] for file in files] == [A4_PX] * 3
    root = link_for_timm(tmp_path, [files[0].name, files[1].name], [files[2].name])
    assert [len(list((root / split).glob("*/*.jpg"))) for split in ("train", "validation")] == [2, 1]


def test_rate_is_read_from_timms_log() -> None:
    line = "Train: 3 [   9/10 (100%)]  Loss: 2.8 (2.9)  Time: 0.412s,   77.61/s  (0.402s,   79.58/s)  LR: 5.0e-04"
    assert TIMM_RATE.findall(line) == ["79.58"]


@pytest.mark.slow
def test_both_loops_are_measured_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_steps.choose_kernels", lambda train: None)  # leave torch's settings unchanged
    train = TrainConfig(img_size=32, batch_size=2, epochs=3)
    figures = measure_steps(Network("test_efficientnet", 32), train, torch.device("cpu"), steps=2, rounds=2)
    assert figures.kernels == "reproducible" and len(figures.ours) == len(figures.bare) == 2
    assert min(figures.ours + figures.bare) > 0


def test_gpu_tables_show_ratios_by_round() -> None:
    steps = [StepFigures("net", "fast, compiled", (90.0, 100.0, 300.0), (100.0, 100.0, 310.0), 1234.5)]
    assert render_steps(steps)[2:] == ["| net | fast, compiled | 100 | 100 | 0.968 | 1234 |"]
    loaders = [LoaderFigures("basic", 300, 8, 4.25, 50.0)]
    assert render_loaders(loaders, steps)[2:] == ["| basic | 300 | 8 | 4.2 | 50 | 50% |"]
    assert render_loaders(loaders, [])[2:] == ["| basic | 300 | 8 | 4.2 | 50 | not measured |"]

"""Compare a run's log and files, Slurm plans and all help texts with golden texts."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from doccls.__main__ import main as doccls
from launcher.cli import main as launcher

if TYPE_CHECKING:
    from conftest import GoldenRun

_MASKS = (
    (r"v001-[0-9a-f]{6}", "<RUN_ID>"),
    (r"run_\d{8}-\d{4}_", "run_<WHEN>_"),
    (r"experiments/\d{8}/", "experiments/<DAY>/"),
    (r"[\d.]+ .iB are free", "<...> are free"),
    (r"-pillow\S+-opencv[\w.]+-", "-pillow<...>-opencv<...>-"),
    (r"pages_[0-9a-f]{16}", "pages_<...>"),
    (r"(mem_MiB|time_s|images_per_s|data_wait)=[\d.]+%?", r"\1=<...>"),
    (r"\[DATA\] steps waited for pages .*\n", ""),
)
_SLURM = (
    "plan", "--backend", "slurm", "--config", "tiny.yaml", "--run-id", "kept", "--set", "output.exp_dir=it's here",
    "--nodes", "2", "--gpus-per-fold", "4", "--partition", "gpu", "--account", "us", "--time", "4:00:00",
    "--at-once", "1", "--sbatch-arg=--qos=high", "--hang-timeout", "1h",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]
_FIGURE = re.compile(r"((?:loss|macro_f1|F1|temperature)=|\b(?:nll|ece|brier) |-> )(\d+\.\d+)")
_TOLERANCE = 0.002  # another order of sums, on another processor, changes a loss by about 1e-6 per step

HELPS = {
    "doccls": (doccls, "--help"),
    "doccls_train": (doccls, "train", "--help"),
    "doccls_blend": (doccls, "blend", "--help"),
    "doccls_predict": (doccls, "predict", "--help"),
    "doccls_check": (doccls, "check", "--help"),
    "doccls_preview": (doccls, "preview", "--help"),
    "doccls_runs": (doccls, "runs", "--help"),
    "doccls_report": (doccls, "report", "--help"),
    "doccls_demo": (doccls, "demo", "--help"),
    "doccls_store": (doccls, "store", "--help"),
    "doccls_store_info": (doccls, "store", "info", "--help"),
    "doccls_store_clear": (doccls, "store", "clear", "--help"),
    "doccls_verify_resume": (doccls, "verify-resume", "--help"),
    "doccls_launch": (launcher, "--help"),
    "doccls_launch_run": (launcher, "run", "--help"),
    "doccls_launch_plan": (launcher, "plan", "--help"),
    "doccls_launch_task": (launcher, "task", "--help"),
    "doccls_launch_merge": (launcher, "merge", "--help"),
    "doccls_launch_status": (launcher, "status", "--help"),
    "doccls_launch_logs": (launcher, "logs", "--help"),
    "doccls_launch_cancel": (launcher, "cancel", "--help"),
}


def mask(text: str, folder: Path) -> str:
    """Mask what differs between runs, and round figures to three decimals."""
    text = text.replace(str(folder), "<FOLDER>")
    for pattern, name in _MASKS:
        text = re.sub(pattern, name, text)
    return _FIGURE.sub(lambda match: f"{match[1]}{float(match[2]):.3f}", text)


def split_help(text: str) -> list[str]:
    """Split into words, without what Python 3.13 leaves out: the value of a flag after all but its last name."""
    return re.sub(r"(--[\w-]+) [^\s,\]]+(?=, --)", r"\1", text).split()


def test_log_matches_golden_text(golden_run: "GoldenRun", read_golden: Callable[[str, str], str]) -> None:
    log = mask(golden_run.log, golden_run.folder)
    golden = read_golden("train.log", log)
    assert _FIGURE.sub(r"\1<...>", log).splitlines() == _FIGURE.sub(r"\1<...>", golden).splitlines()
    figures, expected = ([float(value) for _, value in _FIGURE.findall(text)] for text in (log, golden))
    assert figures == pytest.approx(expected, abs=_TOLERANCE)


def test_console_shows_log_and_final_line(golden_run: "GoldenRun") -> None:
    assert golden_run.stdout == golden_run.log + "[EXIT] training finished successfully (see logs/* for details)\n"
    assert golden_run.stderr == ""


def test_run_writes_expected_files(golden_run: "GoldenRun", read_golden: Callable[[str, str], str]) -> None:
    files = sorted(str(path.relative_to(golden_run.folder)) for path in golden_run.folder.rglob("*") if path.is_file())
    text = mask("\n".join(name for name in files if not name.startswith("data/train/")) + "\n", golden_run.folder)
    assert text == read_golden("files.txt", text)


@pytest.mark.parametrize("form", ["txt", "json"])
def test_slurm_plan_matches_golden_text(
    form: str,
    golden_run: "GoldenRun",
    call_command: Callable[..., tuple[int, str, str]],
    read_golden: Callable[[str, str], str],
) -> None:
    code, out, err = call_command(launcher, *_SLURM, *(["--json"] if form == "json" else []), cwd=golden_run.folder)
    assert (code, err) == (0, "")
    out = out.replace(sys.executable, "<PYTHON>").replace(f"home={_ROOT}", "home=<CHECKOUT>")
    text = mask(out, golden_run.folder)
    text = re.sub(r"here/\d{8}/", "here/<DAY>/", text)
    assert text == read_golden(f"slurm_plan_{form}.txt", text)


@pytest.mark.parametrize("name", HELPS)
def test_help_matches_golden_text(
    name: str,
    call_command: Callable[..., tuple[int, str, str]],
    read_golden: Callable[[str, str], str],
) -> None:
    main, *arguments = HELPS[name]
    code, out, err = call_command(main, *arguments)
    assert (code, err) == (0, "")
    golden = read_golden(f"help_{name}.txt", out)
    if sys.version_info < (3, 13):
        assert out == golden
    else:  # whose argparse indents differently
        assert split_help(out) == split_help(golden)

"""Fixtures of the `golden` suite: one tiny run from the command line, and the expected texts."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
RENEW = "DOCCLS_RENEW_GOLDEN"
_HEAD = f"# Golden text. After a change that is meant: {RENEW}=1 python -m pytest tests/golden, then read the diff.\n"
_CONSOLE = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
_CONFIG = """\
project: {seed: 7}
data: {train_csv: data/train.csv, image_dir_train: data/train, folds: 2, num_workers: 0}
model: {name: test_convnext, pretrained: false}
train:
  {img_size: 64, batch_size: 5, epochs: 2, lr: 1e-2, optimizer: sgd, warmup_epochs: 0, cpu_threads: 1, log_interval: 1}
augment: {rotate_deg: 0, scale: 0, shift: 0, brightness: 0}
"""


@dataclass(frozen=True)
class GoldenRun:
    """The folder and console output of a finished run."""

    folder: Path
    stdout: str
    stderr: str

    @property
    def log(self) -> str:
        """The text of the only log file."""
        (path,) = self.folder.glob("logs/*")
        return path.read_text(encoding="utf-8")


@pytest.fixture
def call_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return `call_command(main, *arguments, cwd)` -> exit code, stdout, stderr; without colours, 100 columns wide."""

    def call(main: Callable[[Sequence[str]], int], *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
        for name, value in _CONSOLE.items():
            monkeypatch.setenv(name, value)
        if cwd is not None:
            monkeypatch.chdir(cwd)
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            assert isinstance(end.code, int)
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def golden_run(tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    """Train two folds of 22 pages for two epochs in one process, from the command line."""
    folder: Path = tmp_path_factory.mktemp("golden")
    _write_pages(folder / "data")
    (folder / "tiny.yaml").write_text(_CONFIG)
    environment = os.environ | _CONSOLE | {
        "CUDA_VISIBLE_DEVICES": "", "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [sys.executable, "-m", "doccls.train", "--config", "tiny.yaml"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return GoldenRun(folder, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def read_golden() -> Callable[[str, str], str]:
    """Return `read_golden(name, text)`, which reads the golden text, or first replaces it by `text` if RENEW is set."""

    def read(name: str, text: str) -> str:
        path = HERE / name
        if os.environ.get(RENEW):
            path.write_text(_HEAD + text, encoding="utf-8")
        assert path.exists(), f"no golden text {path}: set {RENEW}=1 once"
        return path.read_text(encoding="utf-8").removeprefix(_HEAD)

    return read


def _write_pages(folder: Path) -> None:
    """Write 22 striped pages of 64 px in 3 classes; as PNG, so that pixels do not depend on a codec's version."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(3)
    rows = ["ID,target"]
    for row in range(22):
        label = row % 3
        page = np.full((64, 64, 3), 230, dtype=np.uint8)
        page[8:56:8, 8:56] = (30, 30, 30) if label == 0 else page[0, 0]
        page[8:56, 8:56:8] = (30, 30, 30) if label == 1 else page[0, 0]
        page -= rng.integers(0, 25, page.shape, dtype=np.uint8)
        Image.fromarray(page).save(folder / "train" / f"page_{row:02d}.png")
        rows.append(f"page_{row:02d},{label}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")

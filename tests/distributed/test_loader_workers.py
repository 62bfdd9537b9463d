"""Loader workers that die, run out of shared memory or read a bad image: the run soon ends with a clear error."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from crashing_pages import CRASHING, CrashingDataset
from rank_launcher import clean_environment
from test_signals_to_runs import join, running_with_workers
from tiny_runs import PLAIN, Run, Trainer, write_pages

from doccls.data.dataset import Pages
from doccls.data.loader import WorkerError, loading
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.errors import RankLocalError

DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("pages")
    write_pages(folder / "data")
    paths = sorted((folder / "data" / "train").iterdir())
    return Pages([path.name for path in paths], paths, np.zeros(len(paths), np.int64), 64, 64, 10**6)


@pytest.mark.parametrize("crash", DEATHS)
def test_sample_that_killed_a_worker_is_named(pages: Pages, crash: signal.Signals) -> None:
    requests = [BatchRequest(BatchPlace("validate", 0), (sample,)) for sample in range(12)]
    message = f"was killed by {crash.name} while loading ID '{pages.ids[CRASHING]}' \\({pages.paths[CRASHING]}\\)"
    with (
        loading(CrashingDataset(pages, crash=crash), requests, num_workers=2, pin_memory=False) as batches,
        pytest.raises(WorkerError, match=message),
    ):
        list(batches)


@pytest.mark.parametrize("death", DEATHS)
def test_death_of_a_worker_ends_the_run(trainer: Trainer, death: signal.Signals) -> None:
    with running_with_workers(trainer) as (folder, process, descendants):
        worker = next(child for child in descendants if child.ppid() != process.pid)  # the server's child
        worker.send_signal(death)
        assert join([process], folder) == [1]
        _, left = psutil.wait_procs(descendants, timeout=30)
        assert left == []
    lines = Run([], folder).lines
    assert lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]
    assert f"loader worker {worker.pid} was killed by {death.name} while " in lines[-3]
    assert "[EXIT][ERROR] training failed: loader worker" in (folder / "console" / "rank0.err").read_text()


def test_image_that_becomes_unreadable_is_reported_without_traceback(pages: Pages, tmp_path: Path) -> None:
    shutil.copytree(pages.paths[0].parent, tmp_path / "train")  # type: ignore[union-attr]
    copies = [tmp_path / "train" / name for name in pages.ids]
    copies[5].write_bytes(b"no image")
    requests = [BatchRequest(BatchPlace("validate", 0), (sample,)) for sample in range(12)]
    with (
        loading(CrashingDataset(pages._replace(paths=copies), crash=signal.SIGKILL), requests[4:], 2, False) as batches,
        pytest.raises(RankLocalError) as caught,
    ):
        list(batches)
    assert str(caught.value).startswith(
        f"image of ID '{pages.ids[5]}' can no longer be read: {copies[5]}: not an image"
    )
    assert "Traceback" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small /dev/shm needs a mount of its own")
@pytest.mark.parametrize(("size_kib", "code"), [(640, 0), (40, 1)])
def test_small_shared_memory_reduces_prefetch_or_is_rejected(trainer: Trainer, size_kib: int, code: int) -> None:
    """A batch is 11 x 64 x 64 x 3 = 132 KiB: 640 KiB hold two prefetched batches and two in use; 40 KiB hold none."""
    folder = trainer.new_folder()
    sets = (*PLAIN, "data.num_workers=1", "data.valid_fold=2", "train.epochs=1")
    script = f'mount -t tmpfs -o size={size_kib}k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh",
         sys.executable, "-m", "doccls.train", *trainer.arguments(sets, folder)],
        env=clean_environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    lines = Run([], folder).lines
    if code == 0:
        assert any(line.startswith("[DATA] /dev/shm has ") and "workers prefetch 2 batches" in line for line in lines)
    else:
        assert (
            "data.num_workers = 1 with 132 KiB per batch needs 480 KiB" in done.stderr and "--shm-size" in done.stderr
        )

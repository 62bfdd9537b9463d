"""Loader workers that die, starve or meet a bad image: the run ends with words, soon, whatever happened to them."""

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
from test_signals_to_runs import join, with_workers
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
def test_the_sample_that_killed_a_worker_is_named(pages: Pages, crash: signal.Signals) -> None:
    keys = [BatchRequest(BatchPlace("validate", 0), (sample,)) for sample in range(12)]
    told = f"was killed by {crash.name} while loading ID '{pages.ids[CRASHING]}' \\({pages.paths[CRASHING]}\\)"
    with (
        loading(CrashingDataset(pages, crash=crash), keys, num_workers=2, pin_memory=False) as batches,
        pytest.raises(WorkerError, match=told),
    ):
        list(batches)


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_in_mid_epoch_ends_the_run(trainer: Trainer, death: signal.Signals) -> None:
    with with_workers(trainer) as (folder, process, family):
        worker = next(one for one in family if one.ppid() != process.pid)  # the server's child
        worker.send_signal(death)
        assert join([process], folder) == [1]
        _, left = psutil.wait_procs(family, timeout=30)
        assert left == []
    lines = Run([], folder).lines
    assert lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]
    assert f"loader worker {worker.pid} was killed by {death.name} while " in lines[-3]
    assert "[EXIT][ERROR] training failed: loader worker" in (folder / "console" / "rank0.err").read_text()


def test_an_image_that_turns_bad_is_told_by_a_worker_in_its_words_alone(pages: Pages, tmp_path: Path) -> None:
    shutil.copytree(pages.paths[0].parent, tmp_path / "train")  # type: ignore[union-attr]
    copies = [tmp_path / "train" / name for name in pages.ids]
    copies[5].write_bytes(b"no image")
    keys = [BatchRequest(BatchPlace("validate", 0), (sample,)) for sample in range(12)]
    with (
        loading(CrashingDataset(pages._replace(paths=copies), crash=signal.SIGKILL), keys[4:], 2, False) as batches,
        pytest.raises(RankLocalError) as met,
    ):
        list(batches)
    assert str(met.value).startswith(f"image of ID '{pages.ids[5]}' can no longer be read: {copies[5]}: not an image")
    assert "Traceback" not in str(met.value)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small /dev/shm needs a mount of its own")
@pytest.mark.parametrize(("size_kib", "code"), [(640, 0), (40, 1)])
def test_a_small_shared_memory_is_made_do_or_told(trainer: Trainer, size_kib: int, code: int) -> None:
    """A batch is 11 x 64 x 64 x 3 = 132 KiB: two ahead, and the two in use, have room in 640 KiB; nothing has in 40."""
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

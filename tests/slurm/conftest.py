"""Fixtures of the suite `slurm`: a real Slurm cluster of two nodes on this machine."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from tiny_runs import Trainer, write_pages


@pytest.fixture(scope="session", autouse=True)
def cluster(need: Callable[[str, bool, str], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name, path=path) is None]
    need("slurm", not missing, f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.act("up")
    yield cluster
    cluster.act("down")


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trainer of runs on 48 drawn pages."""
    workplace: Path = tmp_path_factory.mktemp("slurm-runs")
    return Trainer(write_pages(workplace / "data"), workplace)

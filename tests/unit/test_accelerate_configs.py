"""accelerate_configs/: Accelerate accepts each file, and its settings match its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).resolve().parents[2] / "accelerate_configs"
EXPECTED = {
    # file: (processes, machines, precision, kind, CPU)
    "cpu_1.yaml": (1, 1, "no", "NO", True),
    "cpu_2.yaml": (2, 1, "no", "MULTI_GPU", False),  # with anything else Accelerate starts one process
    "gpu_1.yaml": (1, 1, "no", "NO", False),
    "gpu_all.yaml": (8, 1, "no", "MULTI_GPU", False),
    "gpu_all_bf16.yaml": (8, 1, "bf16", "MULTI_GPU", False),
    "gpu_all_fp16.yaml": (8, 1, "fp16", "MULTI_GPU", False),
    "machines_2.yaml": (16, 2, "no", "MULTI_GPU", False),
}


def test_folder_holds_expected_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_settings_that_match_file_name(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    found = (config.num_processes, config.num_machines, str(config.mixed_precision), str(kind), config.use_cpu)
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_knows_every_key(name: str) -> None:
    stated = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    config = load_config_from_file(str(FOLDER / name))
    assert set(stated) - set(vars(config)) == set()
    assert (FOLDER / name).read_text(encoding="utf-8").startswith("# "), "the first line should state the purpose"


def test_multi_machine_config_has_rendezvous_address() -> None:
    config = load_config_from_file(str(FOLDER / "machines_2.yaml"))
    assert config.main_process_ip and config.main_process_port and config.machine_rank == 0
    assert config.num_processes % config.num_machines == 0

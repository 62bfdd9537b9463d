"""The search with Optuna in docs/launcher.md, run as it is on small pages, and continued."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from rank_launcher import REPOSITORY, clean_environment
from tiny_runs import Trainer


def test_search_of_the_documentation_runs_and_continues(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    folder.mkdir(parents=True)
    page = (REPOSITORY / "docs" / "launcher.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    values = yaml.safe_load(trainer.config.read_text())
    values["data"] |= {"num_workers": 0, "train_csv": "train.csv", "folds": 2}
    values["train"] |= {"epochs": 1, "cpu_threads": 1}
    values["output"] |= {"exp_dir": str(folder / "experiments"), "logs_dir": str(folder / "logs")}
    config = trainer.config.with_name("search.yaml")
    config.write_text(yaml.safe_dump(values))
    script = script.replace('"configs/train.yaml"', repr(str(config)))
    environment = clean_environment()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for trials in (1, 2):
        run = subprocess.run(
            [sys.executable, "-c", re.sub(r'Path\("experiments"\), 20', f'Path("experiments"), {trials}', script)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert len(list(folder.glob("experiments/2*/search-*/summary.json"))) == trials
    assert re.search(r"^[01] \{'lr': [\d.e-]+, 'label_smoothing': [\d.]+\}$", run.stdout, re.MULTILINE), run.stdout
    assert (folder / "search.db").is_file()

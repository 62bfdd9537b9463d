"""Rendering of the batch scripts of slurm/ and `run --backend slurm` from one template, and of sbatch commands; pure.

`python -m launcher.slurm.script kfold` (or `merge`) prints the checked-in script.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_GPU_REQUEST = re.compile(r"(--gpus[a-z-]*|-G|--gres|--tres-per-[a-z]+)=?(.*)", re.DOTALL)
_FIND_PYTHON = """python=
for candidate in "$DOCCLS_PYTHON" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \\
  "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$SLURM_SUBMIT_DIR/.venv/bin/python" \\
  "$home/.venv/bin/python" "$(command -v python3 || true)"; do
  # Import from another folder: doccls must be installed, not merely be the source in the current one.
  if [ -x "$candidate" ] && (cd / && "$candidate" -c 'import launcher.arguments') 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  printf '%s\\n' '[EXIT] TRAINING ERROR code=1' >&2
  printf '[EXIT][ERROR] training failed: no Python with doccls on %s: make %s/.venv (make lint), or name one: %s\\n' \\
    "$(hostname)" "$home" 'export DOCCLS_PYTHON=... before sbatch, or in slurm/env.sh (docs/slurm.md)' >&2
  exit 1
fi"""
_FIND_HOME = """job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
[ -n "$job" ] || { echo 'not a Slurm job; submit it with: sbatch slurm/@NAME@.sh @ARGUMENTS@' >&2; exit 2; }

# Slurm runs a copy of this file: the original is in the submission folder, or at the path that squeue shows.
home=$SLURM_SUBMIT_DIR
if [ ! -f "$home/slurm/@NAME@.sh" ] && command -v squeue >/dev/null; then
  for try in {1..10}; do # the controller may be unavailable for a while
    command=$(timeout 20 squeue --noheader --jobs="$job" --format=%o && echo .) && break || sleep 15
  done
  command=${command%$'\\n.'} # the dot keeps "$( )" from stripping the path's own newlines
  [ $# -eq 0 ] || command=${command%" $*"}
  [ -z "$command" ] || home=${command%/slurm/*}
fi"""
_RUN_SETUP = """# Run the lines of --setup. The task gets them too, for the command that resumes the run.
previous=
for argument; do
  case $previous in --setup) eval "$argument" ;; esac
  case $argument in --setup=*) eval "${argument#*=}" ;; esac
  previous=$argument
done"""
_REPORT_FAILURE = """trap 'printf "%s\\n" "[EXIT] TRAINING ERROR code=$?" \\
  "[EXIT][ERROR] training failed: $BASH_COMMAND" >&2' ERR"""
_CHOOSE_CONFIG = """config=configs/train.yaml
[ -f "$config" ] || config=$home/$config
case ${1--} in -*) ;; *) config=$1; shift ;; esac"""
_KFOLD_HELP = """
Train the folds of one run as a job array, one task per fold; the task that finishes last merges them:

    sbatch [SBATCH OPTIONS] slurm/kfold.sh [CONFIG] [--setup LINE] [--set KEY=VALUE ...] [--run-id ID]

Options of sbatch override the #SBATCH lines. To load modules, conda and the like, write slurm/env.sh, or pass
--setup 'module load cuda'. Each task trains its fold on all GPUs that it gets: --gres=gpu:4, --gres=gpu:a100:1;
--gres=none trains on CPUs.
""".strip("\n")
_MERGE_HELP = """
Merge the folds of a run in a separate job:

    sbatch --dependency=afterany:JOB slurm/merge.sh RUN

""".strip("\n")


@dataclass(frozen=True)
class JobRequest:
    """Resources to request for each task of a submitted array; None: the cluster's default."""

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    gres: str | None = None  # the complete --gres, including GPUs
    at_once: int | None = None  # maximum number of tasks that run at the same time
    others: tuple[str, ...] = ()  # further arguments of sbatch, which take precedence


def find_gpu_request(arguments: Sequence[str]) -> tuple[str, str] | None:
    """Find sbatch's first argument that requests GPUs, such as (`--gres`, `gpu:a100:2`); None if none does."""
    for argument in arguments:
        match = _GPU_REQUEST.fullmatch(argument)
        if match and (match[1].startswith(("--gpus", "-G")) or re.search("gpu|shard|mps|none", match[2])):
            return match[1], match[2]
    return None


def render_directives(name: str, nodes: int, gpus_per_node: int, cpus_per_task: int) -> list[str]:
    """Render the #SBATCH options that all scripts of doccls have in common."""
    return [
        f"--job-name={name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gres=gpu:{gpus_per_node}"] if gpus_per_node else []),  # clusters without GPUs reject gpu:0
        f"--cpus-per-task={cpus_per_task}",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
    ]


def render_job(comment: str, directives: Sequence[str], home: str, steps: Sequence[str], command: str) -> str:
    """Render a batch script: a comment, sbatch's options, then bash.

    `home` sets $home, whose slurm/env.sh is read next, and `steps` set $python, which runs the command.
    """
    head = "\n".join(["#!/bin/bash", *(f"# {line}".rstrip() for line in comment.splitlines()), "#"])
    options = "\n".join(f"#SBATCH {directive}" for directive in directives)
    source = 'env=$SLURM_SUBMIT_DIR/slurm/env.sh\n[ -f "$env" ] || env=$home/slurm/env.sh\n[ ! -f "$env" ] || . "$env"'
    prologue = f"set -eo pipefail\n{_REPORT_FAILURE}"
    blocks = [prologue, home, source, *steps, f'exec "$python" -m launcher {command}']
    return f"{head}\n{options}\n" + "\n\n".join(blocks) + "\n"


def render_kfold() -> str:
    """Render slurm/kfold.sh."""
    directives = render_directives("doccls", nodes=1, gpus_per_node=1, cpus_per_task=4)
    home = _FIND_HOME.replace("@NAME@", "kfold").replace("@ARGUMENTS@", "[CONFIG]")
    steps = [_RUN_SETUP, _CHOOSE_CONFIG, _FIND_PYTHON]
    return render_job(_KFOLD_HELP, ["--array=0-4", *directives], home, steps, 'task --config "$config" "$@"')


def render_merge() -> str:
    """Render slurm/merge.sh."""
    directives = ["--job-name=doccls-merge", "--ntasks=1", "--requeue", "--open-mode=append"]
    home = _FIND_HOME.replace("@NAME@", "merge").replace("@ARGUMENTS@", "RUN")
    return render_job(_MERGE_HELP, directives, home, [_FIND_PYTHON], 'merge "$@"')


def render_script(
    request: JobRequest, name: str, home: str, setup: Sequence[str], python: str, args: Sequence[str]
) -> str:
    """Render the script of a submitted task: `python` runs `doccls-launch task` with the arguments `args`."""
    gpus = 0 if request.gres or find_gpu_request(request.others) else request.gpus_per_node
    directives = render_directives(f"doccls-{name}", request.nodes, gpus, request.cpus_per_task)
    offline = "export HF_HUB_OFFLINE=1 # the weights were downloaded before the submission"
    steps = ["\n".join([offline, *setup]), f"python=${{DOCCLS_PYTHON:-{shlex.quote(python)}}}"]
    help_text = f"Train folds of {name}."
    return render_job(help_text, directives, f"home={shlex.quote(home)}", steps, f"task {shlex.join(args)}")


def render_sbatch(request: JobRequest, folds: Sequence[int], comment: str, output: str) -> tuple[str, ...]:
    """Render the command that submits an array with one task per fold, and reads the script from standard input."""
    limit = "" if request.at_once is None else f"%{request.at_once}"
    stated = {
        "partition": request.partition, "account": request.account, "qos": request.qos, "time": request.time,
        "constraint": request.constraint, "mem": request.mem, "gres": request.gres,
    }  # fmt: skip
    return (
        "sbatch", "--parsable", f"--comment={comment}", f"--array={','.join(map(str, folds))}{limit}",
        f"--output={output}", *(f"--{name}={value}" for name, value in stated.items() if value is not None),
        *request.others,
    )  # fmt: skip


def render_output(folder: str) -> str:
    """Render Slurm's pattern for one output file per task; in a path with a backslash, Slurm expands no pattern."""
    name = "slurm-%A_%a.out"
    return name if "\\" in folder else f"{folder.replace('%', '%%')}/{name}"


if __name__ == "__main__":
    sys.stdout.write({"kfold": render_kfold, "merge": render_merge}[sys.argv[1]]())

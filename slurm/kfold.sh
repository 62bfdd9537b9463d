#!/bin/bash
# Train the folds of one run as a job array, one task per fold; the task that finishes last merges them:
#
#     sbatch [SBATCH OPTIONS] slurm/kfold.sh [CONFIG] [--setup LINE] [--set KEY=VALUE ...] [--run-id ID]
#
# Options of sbatch override the #SBATCH lines. To load modules, conda and the like, write slurm/env.sh, or pass
# --setup 'module load cuda'. Each task trains its fold on all GPUs that it gets: --gres=gpu:4, --gres=gpu:a100:1;
# --gres=none trains on CPUs.
#
#SBATCH --array=0-4
#SBATCH --job-name=doccls
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -eo pipefail
trap 'printf "%s\n" "[EXIT] TRAINING ERROR code=$?" \
  "[EXIT][ERROR] training failed: $BASH_COMMAND" >&2' ERR

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
[ -n "$job" ] || { echo 'not a Slurm job; submit it with: sbatch slurm/kfold.sh [CONFIG]' >&2; exit 2; }

# Slurm runs a copy of this file: the original is in the submission folder, or at the path that squeue shows.
home=$SLURM_SUBMIT_DIR
if [ ! -f "$home/slurm/kfold.sh" ] && command -v squeue >/dev/null; then
  for try in {1..10}; do # the controller may be unavailable for a while
    command=$(timeout 20 squeue --noheader --jobs="$job" --format=%o && echo .) && break || sleep 15
  done
  command=${command%$'\n.'} # the dot keeps "$( )" from stripping the path's own newlines
  [ $# -eq 0 ] || command=${command%" $*"}
  [ -z "$command" ] || home=${command%/slurm/*}
fi

env=$SLURM_SUBMIT_DIR/slurm/env.sh
[ -f "$env" ] || env=$home/slurm/env.sh
[ ! -f "$env" ] || . "$env"

# Run the lines of --setup. The task gets them too, for the command that resumes the run.
previous=
for argument; do
  case $previous in --setup) eval "$argument" ;; esac
  case $argument in --setup=*) eval "${argument#*=}" ;; esac
  previous=$argument
done

config=configs/train.yaml
[ -f "$config" ] || config=$home/$config
case ${1--} in -*) ;; *) config=$1; shift ;; esac

python=
for candidate in "$DOCCLS_PYTHON" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
  "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$SLURM_SUBMIT_DIR/.venv/bin/python" \
  "$home/.venv/bin/python" "$(command -v python3 || true)"; do
  # Import from another folder: doccls must be installed, not merely be the source in the current one.
  if [ -x "$candidate" ] && (cd / && "$candidate" -c 'import launcher.arguments') 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  printf '%s\n' '[EXIT] TRAINING ERROR code=1' >&2
  printf '[EXIT][ERROR] training failed: no Python with doccls on %s: make %s/.venv (make lint), or name one: %s\n' \
    "$(hostname)" "$home" 'export DOCCLS_PYTHON=... before sbatch, or in slurm/env.sh (docs/slurm.md)' >&2
  exit 1
fi

exec "$python" -m launcher task --config "$config" "$@"

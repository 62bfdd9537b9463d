#!/bin/bash
# Merge the folds of a run in a separate job:
#
#     sbatch --dependency=afterany:JOB slurm/merge.sh RUN
#
#SBATCH --job-name=doccls-merge
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -eo pipefail
trap 'printf "%s\n" "[EXIT] TRAINING ERROR code=$?" \
  "[EXIT][ERROR] training failed: $BASH_COMMAND" >&2' ERR

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
[ -n "$job" ] || { echo 'not a Slurm job; submit it with: sbatch slurm/merge.sh RUN' >&2; exit 2; }

# Slurm runs a copy of this file: the original is in the submission folder, or at the path that squeue shows.
home=$SLURM_SUBMIT_DIR
if [ ! -f "$home/slurm/merge.sh" ] && command -v squeue >/dev/null; then
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

exec "$python" -m launcher merge "$@"

#!/bin/bash
# Merge the folds of a run, as a job of its own:
#
#     sbatch --dependency=afterany:JOB slurm/merge.sh RUN
#
#SBATCH --job-name=doccls-merge
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -eo pipefail
[ -n "$SLURM_JOB_ID" ] || { echo 'this is a job for Slurm: sbatch slurm/merge.sh RUN' >&2; exit 2; }

# Slurm runs a copy of this file: it came from the folder of the submission, or from where the queue says.
home=$SLURM_SUBMIT_DIR
if [ ! -f "$home/slurm/find_python.sh" ]; then
  for try in {1..60}; do # the controller may be away for a while
    command=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%o && echo .) && break || sleep 5
  done
  command=${command%$'\n.'} # of which "$( )" would have taken more than that
  [ $# -eq 0 ] || command=${command%" $*"}
  home=${command%/slurm/*}
fi
. "$home/slurm/find_python.sh"

exec "$python" -m launcher merge "$@"

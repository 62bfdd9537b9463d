#!/bin/bash
# Train the folds of one run as a job array, a task a fold; whoever finishes last merges:
#
#     sbatch [SBATCH OPTIONS] slurm/kfold.sh [CONFIG] [--set KEY=VALUE ...] [--run-id ID]
#
# What is given to sbatch wins over these lines. Modules, conda and the like: write them into slurm/env.sh.
#SBATCH --job-name=doccls
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -eo pipefail
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
[ -n "$job" ] || { echo 'this is a job for Slurm: sbatch slurm/kfold.sh [CONFIG]' >&2; exit 2; }

# Slurm runs a copy of this file: it came from the folder of the submission, or from where the queue says.
home=$SLURM_SUBMIT_DIR
if [ ! -f "$home/slurm/find_python.sh" ]; then
  for try in {1..60}; do # the controller may be away for a while
    command=$(squeue --noheader --jobs="$job" --format=%o && echo .) && break || sleep 5
  done
  command=${command%$'\n.'} # of which "$( )" would have taken more than that
  [ $# -eq 0 ] || command=${command%" $*"}
  home=${command%/slurm/*}
fi
. "$home/slurm/find_python.sh"

config=configs/train.yaml
[ -f "$config" ] || config=$home/$config
case ${1--} in -*) ;; *) config=$1; shift ;; esac
exec "$python" -m launcher task --share --config "$config" "$@"

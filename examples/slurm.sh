#!/bin/bash
# Super-resolve many sections on a Slurm cluster, one array task each:
#   sbatch --array=1-$(wc -l < sections.txt) examples/slurm.sh sections.txt
# sections.txt names one Space Ranger or Xenium folder (or store) per line. A task that was pre-empted goes on where it
# stopped when it is requeued, and a finished one is not computed again.
#SBATCH --job-name=stsr
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --output=stsr-%A_%a.log
# With a GPU, add:  #SBATCH --gres=gpu:1
set -euo pipefail

input="$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "${1:?a file with one folder per line}")"
store="$(basename "${input%.zarr}").zarr"

[ -e "$store" ] || srun stsr prepare "$input" --output "$store"

if stsr info "$store" --json | grep '"superres_x10"' > /dev/null; then
    echo "$store already has its maps"
    exit 0
fi

# stsr takes its number of threads from SLURM_CPUS_PER_TASK. On USR1 it saves and ends with 143: go back to the queue.
srun stsr superres "$store" --scale 10 --genes all --figure "${store%.zarr}.png" || {
    status=$?
    [ "$status" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}

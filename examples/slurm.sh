#!/bin/bash
# Super-resolve many sections on a Slurm cluster, one array task each:
#   sbatch --array=1-$(wc -l < sections.txt) examples/slurm.sh sections.txt
# sections.txt lists one Space Ranger or Xenium folder (or store) per line. Stores are written to the folder where sbatch is
# run, so their names must differ. A requeued task resumes where it stopped, and a finished one is not computed again.
#SBATCH --job-name=stsr
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=stsr-%A_%a.log
# With a GPU, add:  #SBATCH --gres=gpu:1
set -euo pipefail

# srun does not inherit this from sbatch; stsr reads its number of threads from SLURM_CPUS_PER_TASK.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# A step that receives USR1 saves its state and exits with 143: requeue the job.
step() {
    local status=0
    srun "$@" || status=$?
    if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    if [ "$status" -ne 0 ]; then exit "$status"; fi
}

input="$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "${1:?a file with one folder per line}")"
input="${input%/}"
run="${input%/outs}" # Space Ranger writes its results to outs
store="$(basename "${run%.zarr}").zarr"

[ -e "$store" ] || step stsr prepare "$input" --output "$store"

if stsr info "$store" --json | grep '"superres_x10"' > /dev/null; then
    echo "$store already has its maps"
    exit 0
fi

step stsr superres "$store" --scale 10 --genes all --figure "${store%.zarr}.png"

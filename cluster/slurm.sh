#!/bin/bash
# Trains on SLURM: sbatch cluster/slurm.sh --config=wan_1_3b --config.init_from=DIR --workdir=DIR ...
# Three minutes before the time limit, and when the job is preempted, every process gets SIGTERM, saves and exits with 75;
# the job is then queued again and resumes.
#SBATCH --job-name=univid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=univid_%j.log

set -u
code=0
# JAX finds the processes through SLURM's variables, and would give each a single GPU.
export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))}"
srun --kill-on-bad-exit=0 univid-train "$@" || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

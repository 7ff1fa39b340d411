#!/usr/bin/env bash
# Run on a SLURM cluster, one process per GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config configs/run/unimoe_8e.yaml      with 8 GPUs per node
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh …  with 4 GPUs per node
#
# A node runs as many processes as it has GPUs. --ntasks-per-node and --cpus-per-task only reserve
# processors for them.
#
# Two minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM. All
# processes then save the same step and leave, and the job queues again and continues there. `output`
# and `data.cache` must be on a file system that all nodes share.
#SBATCH --job-name=unimoe
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh --config RUN.yaml [key=value …]" >&2
  exit 2
fi
python=${PYTHON:-python3}
program=${PROGRAM:-unimoe_jax.train}
# A program that one process has compiled serves all processes and the next start.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/.cache}
export PYTHONUNBUFFERED=1

# The exit code of a program that received SIGTERM and has saved.
export UNIMOE_STOPPED_CODE=75

gpus=${SLURM_GPUS_ON_NODE:-$SLURM_NTASKS_PER_NODE}
# srun would start as many tasks as were reserved, and from SLURM 22.05 on it would give each only
# one processor. So say both.
each=(--ntasks="$((gpus * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$gpus"
  --cpus-per-task="$SLURM_CPUS_PER_TASK")
# The SIGTERM of --signal reaches the processes that srun started, not this script.
code=0
srun "${each[@]}" "$python" -m "$program" "$@" || code=$?
if ((code == UNIMOE_STOPPED_CODE)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

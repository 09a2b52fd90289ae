#!/usr/bin/env bash
#SBATCH --job-name=medisee
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains under SLURM, on any number of nodes, one task per GPU:
#
#   sbatch --nodes=2 scripts/train_slurm.sh configs/medisee_7b.yaml [--resume | --fresh] [train.lr=1e-4 ...]
#
# Submit it from the repository's root, with its Python environment active and all paths on a shared disk. Ten minutes
# before the time limit SLURM sends SIGTERM to the ranks: they stop after the current step with their state saved, and
# the job is requeued and resumes, as it does after a node failure or a preemption. `touch <train.out>/stop` stops it
# without requeueing.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
# shellcheck source=scripts/launch.sh
source scripts/launch.sh

out=$(run_folder "$@")
: "${SLURM_JOB_NODELIST:?is set by SLURM; start this script with sbatch}"
config=$1
shift

# After a restart there is a state to resume, unless the job ended before saving its first. It is this job's even with
# --fresh, which removes the states of an earlier run at the start.
if ((${SLURM_RESTART_COUNT:-0})) && compgen -G "$out/last-*" >/dev/null; then
  arguments=(--resume)
  for argument in "$@"; do
    [[ $argument == --fresh || $argument == --resume ]] || arguments+=("$argument")
  done
  set -- "${arguments[@]}"
fi

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$SLURM_NTASKS

code=0
# exec: the signal goes to Python itself. The rank numbers exist only within a task.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \
  "${PYTHON:-python}" scripts/train.py --config "$config" "$@" || code=$?

if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

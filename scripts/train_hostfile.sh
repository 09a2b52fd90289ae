#!/usr/bin/env bash
# Trains on the GPUs of several machines that reach each other by ssh without a password (DeepSpeed uses pdsh):
#
#   ./scripts/train_hostfile.sh hosts.txt configs/medisee_7b.yaml [--resume | --fresh] [train.lr=1e-4 ...]
#
# hosts.txt has one line per machine, such as `node1 slots=4`; slots are its GPUs. On all of them this folder, its Python
# environment, the data and train.out are at the same path, on a shared disk. MASTER_PORT (29500) can be changed; NCCL_*
# and other variables for all machines go into the file .deepspeed_env.
# How to stop it and continue later: see launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch.sh
source scripts/launch.sh

hostfile=${1:-}
if [[ ! -f $hostfile ]]; then
  echo "error: '$hostfile' is not a hostfile; usage: ./scripts/train_hostfile.sh HOSTFILE CONFIG [--resume | --fresh] [key=value ...]." >&2
  exit 2
fi
shift
launch "$@" -- deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}"

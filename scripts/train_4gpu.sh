#!/usr/bin/env bash
# Trains on the GPUs of one machine:
#
#   ./scripts/train_4gpu.sh configs/medisee_7b.yaml [--resume | --fresh] [train.lr=1e-4 ...]
#
# GPUS=2 uses 2 GPUs instead of 4; train.global_batch of the configuration then keeps the effective batch.
# How to stop it and continue later: see launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch.sh
source scripts/launch.sh

if [[ ! ${GPUS:-4} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: GPUS='$GPUS' is not a number of GPUs; set it to 1 or more, or unset it for 4." >&2
  exit 2
fi
launch "$@" -- deepspeed --num_gpus "${GPUS:-4}" --master_port "${MASTER_PORT:-29500}"

#!/usr/bin/env bash
# Trains on the GPUs of one machine:
#
#   ./scripts/train_4gpu.sh configs/medisee_7b.yaml [--resume | --fresh] [train.lr=1e-4 ...]
#
# GPUS=2 takes another number than 4; train.global_batch of the configuration keeps the effective batch then.
# Ctrl-C, SIGTERM or `touch <train.out>/stop` ends it after the step that is running, with its state saved (exit code
# 130, 143 or 0); --resume goes on from there, also with another number of GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch.sh
source scripts/launch.sh

launch "$@" -- deepspeed --num_gpus "${GPUS:-4}" --master_port "${MASTER_PORT:-29500}"

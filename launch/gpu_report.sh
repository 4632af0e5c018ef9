#!/usr/bin/env bash
# Measures this machine's GPU and writes docs/gpu.md: makes .venv as gpu.sh does, then runs simclr_jax.gpu_report.
# A report that is there already is not overwritten.
# With PyTorch beside it where .venv has it: .venv/bin/python -m pip install torch
# usage: bash launch/gpu_report.sh [--images=256,512,1024] [--large=8192,64] [--pairs=131072] [--output=docs/gpu.md]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"
ACCELERATOR=gpu prepare_environment "$ROOT/requirements.txt"
cd "$ROOT"
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # its figures are of one
exec "$PYTHON" -m simclr_jax.gpu_report --config=configs/imagenet.py "$@"

#!/usr/bin/env bash
# Pretrains on CIFAR-10 for 200 and for 1,000 epochs, evaluates both, and writes a table to docs/cifar10.md: makes
# .venv as gpu.sh does, then runs simclr_jax.benchmark.cifar10. After a stop the same command goes on.
# usage: bash launch/cifar10.sh [PHOTOS] [--tasks=pretrain_200,pretrain] [--workdir=DIR] [--config.KEY=VALUE ...]
#   DIR is relative to the repository; runs/cifar10_table by default.
#   PHOTOS has all 60,000 as files, in train/CLASS/ and test/CLASS/; without it TensorFlow Datasets has cifar10.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"
if command -v nvidia-smi >/dev/null; then : "${ACCELERATOR:=gpu}"; fi
prepare_environment "$ROOT/requirements.txt"
if [ -n "${1:-}" ] && [ "${1#-}" = "$1" ]; then
  if [ ! -d "$1/train" ]; then
    echo "error: $1 has no folder train: give the folder of train/CLASS/ and test/CLASS/" >&2
    exit 2
  fi
  photos=$(cd "$1" && pwd)
  shift
  set -- "--config.dataset.name=folder" "--config.dataset.path=$photos" "$@"
fi
cd "$ROOT"
exec "$PYTHON" -m simclr_jax.benchmark.cifar10 --config=configs/cifar10.py --workdir=runs/cifar10_table "$@"

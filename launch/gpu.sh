#!/usr/bin/env bash
# Runs one task on all NVIDIA GPUs of this machine, in one process: makes .venv and installs requirements.txt
# and launch/requirements-gpu.txt where needed, then runs main.
# usage: bash launch/gpu.sh [OPTIONS] -- --config=configs/imagenet.py --workdir=DIR [--config.KEY=VALUE ...]
#
#   --gpus=0,1   only these, as nvidia-smi numbers them
#   --dry_run    print the commands, one a line, and run none
# NVIDIA's driver has to be 580 or newer for CUDA 13; ACCELERATOR=gpu12 before the command takes CUDA 12, from 525 on.
set -euo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

gpus=''
read_options "gpus" "dry_run" "$@"
need_config
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail "--gpus=$gpus is no list of numbers: give it as in --gpus=0,1"

query=(nvidia-smi --query-gpu=name "--format=csv,noheader")
command=(env "ACCELERATOR=${ACCELERATOR:-gpu}")
if [ -n "$gpus" ]; then
  query+=("--id=$gpus")
  # CUDA would number the fastest GPU 0.
  command+=(CUDA_DEVICE_ORDER=PCI_BUS_ID "CUDA_VISIBLE_DEVICES=$gpus")
fi
command+=(bash "$ROOT/launch/local.sh" "${arguments[@]}")

found=$(ask '' call "${query[@]}" 2>/dev/null) ||
  fail "nvidia-smi finds no GPU${gpus:+ $gpus}: install NVIDIA's driver, or use launch/local.sh for CPU"
say "GPUs: $(count <<<"$found")"
if [ -n "$dry_run" ]; then call "${command[@]}"; else exec "${command[@]}"; fi

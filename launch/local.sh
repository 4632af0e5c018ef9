#!/usr/bin/env bash
# Runs simclr-jax on this machine: makes .venv and installs requirements.txt where needed, then runs the command.
# usage: bash launch/local.sh VERB ... | --config=configs/digits.py [--workdir=DIR] [--config.KEY=VALUE ...]
# Paths are relative to the folder you are in; a config that is not there is taken from the repository.
# Once .venv is there, --help lists verbs, and with a --config every key.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_configs "$@"
module=simclr_jax # its first argument may be a verb
[[ ${1:-} != --*=* ]] || module=simclr_jax.main
if [[ " $* " == *" --help "* ]] && compgen -G "$ROOT/.venv/installed-*" >/dev/null; then
  PYTHONPATH=$ROOT exec "$ROOT/.venv/bin/python" -m "$module" "${arguments[@]}"
fi
help_if_asked "$@"
prepare_environment "$ROOT/requirements.txt"

# XLA on CPU frees every activation: let glibc keep that memory. Its heaps of threads hold 64 MB, or four huge pages of
# the size it is told to try; of those of 1 GB the kernel has none to give unless an administrator has reserved some.
export MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
if [ ! -e /dev/nvidiactl ] && grep -qsx 0 /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages; then
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1073741824
fi

echo "== python -m $module ${arguments[*]}"
exec "$PYTHON" -m "$module" "${arguments[@]}"

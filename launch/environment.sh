# shellcheck shell=bash
# Sourced by local.sh and test.sh: makes ROOT/.venv and installs requirement files into it, once.
# usage: prepare_environment REQUIREMENTS...   (sets ROOT and PYTHON)
# ACCELERATOR=gpu or tpu adds launch/requirements-ACCELERATOR.txt. `bash launch/environment.sh` only prepares.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

prepare_environment() {
  local venv=$ROOT/.venv base=${BASE_PYTHON:-python3} wanted mark
  PYTHON=$venv/bin/python
  if [ -n "${ACCELERATOR:-}" ]; then
    set -- "$@" "$ROOT/launch/requirements-$ACCELERATOR.txt"
    if [ ! -e "${*: -1}" ]; then
      echo "error: ACCELERATOR=$ACCELERATOR is unknown: set it to gpu or tpu, or leave it out" >&2
      return 2
    fi
  fi
  if ! "$PYTHON" -c '' 2>/dev/null; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "error: '$base' is no Python 3.11 or newer: set BASE_PYTHON to one" >&2
      return 2
    fi
    echo "== making $venv"
    "$base" -m venv --clear "$venv"
  fi
  wanted=$(cat "$@" | cksum)
  mark=$venv/installed-${1##*/}-$#${ACCELERATOR:+-$ACCELERATOR}
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing ${*#"$ROOT"/} into $venv (some minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
    echo "$wanted" >"$mark"
  fi
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

# usage: find_configs MAIN ARGUMENTS...   (sets `arguments`: a config that is not there is the repository's)
find_configs() {
  local argument config
  arguments=()
  for argument in "$@"; do
    config=${argument#--config=}
    if [ "$config" != "$argument" ] && [ ! -e "${config%%:*}" ] && [ -e "$ROOT/${config%%:*}" ]; then
      argument=--config=$ROOT/$config
    fi
    arguments+=("$argument")
  done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  prepare_environment "$ROOT/requirements.txt"
fi

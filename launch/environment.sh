# shellcheck shell=bash
# Sourced by local.sh and test.sh: makes ROOT/.venv and installs requirement files into it, once.
# usage: prepare_environment REQUIREMENTS...   (sets ROOT and PYTHON)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

prepare_environment() {
  local venv=$ROOT/.venv base=${BASE_PYTHON:-python3} wanted
  PYTHON=$venv/bin/python
  if ! "$PYTHON" -c '' 2>/dev/null; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "error: '$base' is no Python 3.11 or newer: set BASE_PYTHON to one" >&2
      return 2
    fi
    echo "== making $venv"
    "$base" -m venv --clear "$venv"
  fi
  wanted=$(cat "$@" | cksum)
  if [ "$(cat "$venv/installed-${1##*/}-$#" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing ${*#"$ROOT"/} into $venv (some minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
    echo "$wanted" >"$venv/installed-${1##*/}-$#"
  fi
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

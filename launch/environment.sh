# shellcheck shell=bash
# Sourced by the scripts beside it: makes ROOT/.venv and installs requirement files into it, once.
# usage: prepare_environment REQUIREMENTS...   (sets ROOT and PYTHON)
# ACCELERATOR=gpu, gpu12 or tpu adds launch/requirements-ACCELERATOR.txt. `bash launch/environment.sh` only prepares.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

prepare_environment() {
  local venv=$ROOT/.venv base=${BASE_PYTHON:-python3} wanted mark
  local supported='import sys; 11 <= sys.version_info[1] < 14 or sys.exit("it is " + sys.version.split()[0])'
  PYTHON=$venv/bin/python
  if [ -n "${ACCELERATOR:-}" ]; then
    set -- "$@" "$ROOT/launch/requirements-$ACCELERATOR.txt"
    if [ ! -e "${*: -1}" ]; then
      echo "error: ACCELERATOR=$ACCELERATOR is unknown: set it to gpu, gpu12 or tpu, or leave it out" >&2
      return 2
    fi
  fi
  wanted=$(cat "$@" | cksum)
  mark=$venv/installed-${1##*/}-$#${ACCELERATOR:+-$ACCELERATOR}
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c '' 2>/dev/null; then
    # An environment that was half made, copied or of a Python that is gone has no pip that works.
    "$PYTHON" -c "$supported; import pip._internal.commands.install" &>/dev/null || make_environment || return
    echo "== installing ${*#"$ROOT"/} into $venv (some minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
    echo "$wanted" >"$mark"
  fi
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

# usage: make_environment   (makes the .venv of prepare_environment anew, whose variables it takes)
make_environment() {
  local text
  if ! text=$("$base" -c "$supported" 2>&1); then
    text=${text##*$'\n'}
    echo "error: '$base' is no Python 3.11 or newer, up to 3.13${text:+ ($text)}: set BASE_PYTHON to one" >&2
    return 2
  fi
  echo "== making $venv"
  if ! text=$("$base" -m venv --clear "$venv" 2>&1); then
    case $text in
      *"ensurepip is not"*) text="apt install python3-venv, or python3.12-venv for a Python 3.12" ;;
      *) text=${text##*$'\n'} ;;
    esac
    echo "error: '$base' cannot make $venv: $text; or set BASE_PYTHON to another Python" >&2
    return 2
  fi
}

# usage: help_if_asked ARGUMENTS...   (for --help prints the comment at the top of the script, and ends it)
help_if_asked() {
  [[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
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

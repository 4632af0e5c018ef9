#!/usr/bin/env bash
# The commands that tpu.sh runs on every worker of a machine, from the copy of the repository there.
# usage: bash launch/tpu_worker.sh install | start MAIN ARGUMENTS... | state | stop
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$HOME/simclr_run # log, pid and exit_code of the training; beside the copy, which an install replaces

install() {
  # The images' own Python is 3.10.
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  BASE_PYTHON=$(python3 -m uv python find --managed-python 3.12)
  export BASE_PYTHON ACCELERATOR=tpu
  bash "$root/launch/environment.sh"
}

running() {
  # The command line tells our process from one that got its number after a reboot.
  [ ! -e "$run/exit_code" ] &&
    grep -qsaF "$run/exit_code" "/proc/$(cat "$run/pid" 2>/dev/null)/cmdline"
}

start() {
  local left
  if running; then
    # Workers that lost another one wait for it for ever, and hold the TPU.
    left=-$(cat "$run/pid")
    kill -KILL -- "$left"
    for _ in {1..50}; do
      kill -0 -- "$left" 2>/dev/null || break
      sleep 0.2
    done
  fi
  mkdir -p "$run"
  rm -f "$run/exit_code" "$run/stopped"
  cd "$root"
  # The shell outlives a SIGTERM to write down how main took it.
  # shellcheck disable=SC2016
  ACCELERATOR=tpu setsid bash -c 'trap : TERM; bash launch/local.sh "$@"; echo $? >"$0"' \
    "$run/exit_code" "$@" >>"$run/log" 2>&1 </dev/null &
  echo $! >"$run/pid"
}

state() {
  if running; then
    echo running
  elif [ -e "$run/stopped" ]; then
    echo stopped
  elif [ -e "$run/exit_code" ]; then
    echo "exited $(cat "$run/exit_code")"
  else
    echo absent
  fi
}

stop() {
  if running; then
    touch "$run/stopped"
    kill -TERM -- "-$(cat "$run/pid")"
    for _ in {1..600}; do
      running || break
      sleep 0.2
    done
  fi
  state
}

"$@"

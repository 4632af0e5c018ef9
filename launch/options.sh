# shellcheck shell=bash
# Sourced by gpu.sh, slurm.sh and tpu.sh: their options, --help, --dry_run and errors.
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
dry_run=''
exec 3>&1 # where a dry run prints, also from within $(...)

# usage: fail MESSAGE [EXIT CODE]
fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

# usage: quote WORDS...   (prints one line that a shell reads as these words)
quote() {
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line:1}"
}

# usage: call COMMAND...   (runs it; a dry run prints it instead)
call() {
  if [ -n "$dry_run" ]; then quote "$@" >&3; else "$@" 3>&-; fi
}

# usage: ask ANSWER FUNCTION...   (prints what a FUNCTION made of `call` prints; a dry run assumes ANSWER)
ask() {
  "${@:2}" || return
  [ -z "$dry_run" ] || printf '%s\n' "$1"
}

# usage: say MESSAGE   (a dry run prints commands alone)
say() {
  [ -n "$dry_run" ] || echo "== $*"
}

# usage: count <LINES   (prints how often there is each line, as in `3 running, 1 absent`)
count() {
  sort | uniq -c | sort -nr | sed 's/^ *//' | paste -sd, - | sed 's/,/, /g'
}

# usage: read_options VALUED SWITCHES ARGUMENTS...   (lists of names)
# Sets the variable of each given option, and `arguments` to what follows `--`.
read_options() {
  local valued=" $1 " switches=" $2 " word option
  shift 2
  arguments=()
  while [ $# -gt 0 ]; do
    word=$1
    shift
    option=${word%%=*}
    option=${option#--}
    case $word in
      --help) help_if_asked --help ;;
      --)
        arguments=("$@")
        return
        ;;
      --config* | --workdir*) fail "$word is an argument of main: give it after --, as in -- $word" ;;
      --*)
        if [[ $valued == *" $option "* ]]; then
          [ "$word" != "--$option" ] || fail "--$option has no value: give --$option=VALUE"
          printf -v "$option" '%s' "${word#*=}"
        elif [[ $switches == *" $option "* ]]; then
          [ "$word" = "--$option" ] || fail "--$option takes no value: give --$option alone"
          printf -v "$option" yes
        else
          fail "--$option is unknown: --help lists the options, and arguments of main go after --"
        fi
        ;;
      *) fail "'$word' is no option: --help lists the options, and arguments of main go after --" ;;
    esac
  done
}

# usage: need OPTION EXAMPLE [OR]   (refuses an option that is missing)
need() {
  [ -n "${!1}" ] || fail "--$1 is missing: give --$1=$2${3:-}"
}

# usage: main_flag NAME   (prints the value of --NAME among `arguments`, as main will read it)
main_flag() {
  local value='' index
  for index in "${!arguments[@]}"; do
    case ${arguments[index]} in
      "--$1="* | "-$1="*) value=${arguments[index]#*=} ;;
      "--$1" | "-$1") value=${arguments[index + 1]:-} ;;
    esac
  done
  printf '%s\n' "$value"
}

# usage: need_config   (refuses arguments without a --config, or with one that does not exist)
need_config() {
  local config
  config=$(main_flag config)
  [ -n "$config" ] || fail "--config is missing: give it after --, as in -- --config=configs/imagenet.py"
  [ -e "${config%%:*}" ] || [ -e "$ROOT/${config%%:*}" ] ||
    fail "--config=$config does not exist: give a file of configs/, as in --config=configs/imagenet.py"
}

# usage: check_run OPTIONS...   (those of simclr_jax.check; ends where main would refuse `arguments`)
check_run() {
  local command=(env "PYTHONPATH=$ROOT" JAX_PLATFORMS=cpu "$ROOT/.venv/bin/python" -m simclr_jax.check "$@")
  command+=("${arguments[@]}")
  if [ -x "$ROOT/.venv/bin/python" ]; then
    say "checking the arguments of main"
    [ -z "$dry_run" ] || quote "${command[@]}" >&3
    "${command[@]}" >/dev/null 3>&- || exit
  else
    echo "note: the arguments of main are not checked: bash launch/environment.sh makes the .venv for that" >&2
  fi
}

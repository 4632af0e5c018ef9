#!/usr/bin/env bash
# Trains on a Cloud TPU, on all workers of one machine, through gcloud.
# usage: bash launch/tpu.sh VERB --name=NAME --zone=ZONE [OPTIONS] [-- MAIN ARGUMENTS]
#
#   watch     all that is needed: creates the machine, installs, runs, and does so again after a preemption,
#             until WORKDIR/summary.json tells that the run is finished; stopped and started, it watches on
#   create    creates the machine
#   install   copies launch/, configs/, simclr_jax/ and what else of this clone the arguments of main name, to all
#             workers, and installs what it requires there
#   run       starts the training on all workers, where it goes on without you
#   log       follows the log of worker 0
#   status    tells how the machine and the training are
#   stop      lets the training save a checkpoint and exit
#   delete    deletes the machine and its disk, as nothing else here does for good
#
#   --name, --zone        of the machine, such as simclr and us-central2-b
#   --accelerator_type    such as v4-8; watch and create need it
#   --runtime_version     default: the one for jax on that type
#   --project             default: gcloud's
#   --spot                cheaper, but may be preempted at any time
#   --queued              waits in the queue until there is a machine; otherwise there is one now, or none
#   --poll_seconds=60     between two looks at the machine
#   --attempts=5          so many failures in a row end watch
#   --dry_run             prints the commands, one a line, and runs none
#
# Options with a value may also come from the environment, as TPU_NAME, TPU_ZONE, ...
# With several workers, gcloud wants your key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
# A whole run:
#   bash launch/tpu.sh watch --name=simclr --zone=us-central2-b --accelerator_type=v4-32 --spot --queued \
#       -- --config=configs/imagenet.py --workdir=gs://BUCKET/RUN
set -euo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

verbs="watch create install run log status stop delete"
name=${TPU_NAME:-} zone=${TPU_ZONE:-} accelerator_type=${TPU_ACCELERATOR_TYPE:-} project=${TPU_PROJECT:-}
runtime_version=${TPU_RUNTIME_VERSION:-} poll_seconds=${TPU_POLL_SECONDS:-60} attempts=${TPU_ATTEMPTS:-5}
spot='' queued=''

verb=${1:-}
if [ "$verb" != --help ]; then
  [ -n "$verb" ] || fail "the verb is missing: give one of $verbs"
  [[ " $verbs " == *" $verb "* ]] || fail "'$verb' is no verb: give one of $verbs"
  shift
fi
valued="name zone accelerator_type runtime_version project poll_seconds attempts"
read_options "$valued" "spot queued dry_run" "$@"
need name simclr " or set TPU_NAME"
need zone us-central2-b " or set TPU_ZONE"
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name=$name is no name of a machine: give a-z, 0-9 and hyphens"
[[ $attempts =~ ^[0-9]+$ ]] || fail "--attempts=$attempts is no number: give one, as 5"
[[ $poll_seconds =~ ^[0-9.]+$ ]] || fail "--poll_seconds=$poll_seconds is no number: give one, as 60"

if [[ $verb == watch || $verb == create ]]; then
  need accelerator_type v4-8 " or set TPU_ACCELERATOR_TYPE"
  case $accelerator_type in
    v[234]-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) default='' ;;
  esac
  runtime_version=${runtime_version:-$default}
  need runtime_version VERSION ", since $accelerator_type has no default here"
fi

if [[ $verb == watch || $verb == run ]]; then
  need_config
  config=$(main_flag config)
  [ -e "$ROOT/${config%%:*}" ] ||
    fail "--config=$config is not in $ROOT: only what is there gets to the machine"
  workdir=$(main_flag workdir)
  [ -n "$workdir" ] || fail "--workdir is missing: give it after --, as in -- --workdir=gs://BUCKET/RUN"
  [[ $workdir == gs://?* ]] ||
    fail "--workdir=$workdir goes when the machine is deleted: give one on Cloud Storage, as gs://BUCKET/RUN"
  workdir=${workdir%/}
  topology=''
  case $accelerator_type in v[234]-* | v5litepod-* | v5p-* | v6e-*) topology=$accelerator_type ;; esac
  (cd "$ROOT" && check_run ${topology:+"--topology=$topology"} --elsewhere) || exit
fi

# A dry run takes these values for granted.
assumed_queue='' assumed_machine='' assumed_training=absent assumed_summary=''
assume_machine() {
  assumed_machine=READY
  [ -z "$queued" ] || assumed_queue=ACTIVE
}
[[ $verb == watch || $verb == create ]] || assume_machine

where=("--zone=$zone" ${project:+"--project=$project"} --quiet)
alive=-oServerAliveInterval=30 # without it ssh waits for hours for a machine that is gone
worker="bash simclr/launch/tpu_worker.sh"
told='' left=maybe

remind() {
  case $left in
    yes) echo "== $name is still there and costs money until you delete it:" >&2 ;;
    maybe) echo "== $name may be there and cost money until you delete it:" >&2 ;;
    no) return ;;
  esac
  quote bash "$0" delete "--name=$name" "--zone=$zone" ${project:+"--project=$project"} >&2
}

if [ -z "$dry_run" ]; then
  trap remind EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
fi

pause() {
  [ -n "$dry_run" ] || sleep "$poll_seconds"
}

# usage: tell STATE   (says it if it is new)
tell() {
  [ "$told" = "$1" ] || say "$1"
  told=$1
}

# usage: on_workers WHICH COMMAND   (COMMAND is for the shell there)
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--ssh-flag=$alive" "--worker=$1" "--command=$2"
}

# Each function from here on returns what a command of it returns that fails.

# Sets queue_state and machine_state, empty for what is not there, and what follows from them: `condition`.
look() {
  queue_state=$(ask "$assumed_queue" call gcloud compute tpus queued-resources list "${where[@]}" \
    "--filter=name~/queuedResources/$name\$" "--format=value(state.state)") || return
  machine_state=$(ask "$assumed_machine" call gcloud compute tpus tpu-vm list "${where[@]}" \
    "--filter=name~/nodes/$name\$" "--format=value(state)") || return
  left=yes
  case $queue_state:$machine_state in
    :) condition=missing left=no ;;
    DELETING:* | SUSPENDING:* | *:DELETING) condition=changing ;;
    FAILED:* | SUSPENDED:* | ACTIVE: | *:PREEMPTED | *:TERMINATED) condition=lost ;;
    *:READY) condition=ready ;;
    *:STOPP* | *:HID* | *:UNKNOWN) condition=off ;;
    *) condition=changing ;;
  esac
  states="queued resource ${queue_state:-none}, machine ${machine_state:-none}"
}

need_ready() {
  look || return
  [ "$condition" = ready ] || fail "$name is not ready ($states): create it, or wait" 1
}

request() {
  left=maybe
  if [ -n "$queued" ]; then
    say "queueing for $name, $accelerator_type"
    call gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
      "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" ${spot:+--spot} || return
  else
    say "creating $name, $accelerator_type"
    call gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      "--accelerator-type=$accelerator_type" "--version=$runtime_version" ${spot:+--spot} || return
  fi
  assume_machine
}

create() {
  look || return
  if [ "$condition" = missing ]; then
    request && look || return
  fi
  while [ "$condition" = changing ]; do
    tell "waiting: $states"
    pause
    look || return
  done
  [ "$condition" = ready ] || fail "$name is not ready ($states): delete it first" 1
  say "$name is ready"
}

delete() {
  say "deleting $name"
  if [ -n "$queue_state" ]; then
    call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force || return
  else
    call gcloud compute tpus tpu-vm delete "$name" "${where[@]}" || return
  fi
  left=no
}

install() {
  local archive=$ROOT/build/$name.tar.gz argument copied=(launch configs simclr_jax requirements.txt)
  for argument in "${arguments[@]#*=}"; do
    [[ -z $argument || $argument == /* || ! -e $ROOT/${argument%%:*} ]] || copied+=("${argument%%:*}")
  done
  call mkdir -p "$ROOT/build" || return
  call tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" -- "${copied[@]}" || return
  [ -n "$dry_run" ] || say "copying $(du -m "$archive" | cut -f1) MB to all workers (${copied[*]}), and installing there"
  call gcloud compute tpus tpu-vm scp "$archive" "$name:simclr.tar.gz" "${where[@]}" "--scp-flag=$alive" \
    --worker=all || return
  on_workers all "mkdir -p simclr && find simclr -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&\
 tar -xzf simclr.tar.gz -C simclr && $worker install"
}

start() {
  say "starting the training; its log: $(quote bash "$0" log "--name=$name" "--zone=$zone")"
  on_workers all "$worker start $(quote "${arguments[@]}")" || return
  assumed_training=running assumed_summary=$workdir/summary.json
}

# Sets `answers` to what each worker says of the training, and `training` to the answer that matters most:
# a worker that knows of none (it was rebooted, say) explains failures elsewhere, one that runs does not.
look_at_training() {
  local answer
  answers=$(ask "$assumed_training" on_workers all "$worker state 2>/dev/null || echo absent") || return
  for answer in absent 'exited 2$' 'exited [1-9]' stopped running 'exited 0'; do
    if training=$(grep -m1 "^$answer" <<<"$answers"); then return; fi
  done
  echo "error: the workers of $name say '$answers' of the training" >&2
  return 1
}

need_idle() {
  need_ready && look_at_training || return
  [ "$training" != running ] || fail "a training runs on $name already: watch, log or stop it" 1
}

status() {
  look || return
  say "$name: $states"
  if [ "$condition" = ready ]; then
    look_at_training || return
    say "training: $(count <<<"$answers")"
  fi
}

stop() {
  need_ready || return
  say "stopping the training; it saves a checkpoint first"
  answers=$(ask stopped on_workers all "$worker stop") || return
  say "training: $(count <<<"$answers")"
  ! grep -q '^running' <<<"$answers" || fail "it still runs after two minutes: stop again to end it at once" 1
}

# Looks once, and does the next thing that brings the run forward; exits where there is none.
advance() {
  local summary
  summary=$(ask "$assumed_summary" call gcloud storage objects list "$workdir/summary.json" \
    "--filter=-noncurrent_time:*" "--format=value(name)") || return
  if [ -n "$summary" ]; then
    say "finished: $workdir/summary.json"
    exit 0
  fi
  look || return
  [ "$condition" = ready ] || started=''
  case $condition in
    missing) request ;;
    changing) tell "waiting: $states" && pause ;;
    off) fail "$name is off ($states): start it by gcloud, or delete it" 1 ;;
    lost)
      say "lost: $states"
      failures=$((failures + 1))
      delete
      ;;
    ready)
      look_at_training || return
      if [ -z "$started" ]; then begin; else follow; fi
      ;;
  esac
}

begin() {
  if [ "$training" = running ]; then
    say "a training runs on $name already: watching it"
  else
    install && start || return
  fi
  started=yes suspect=''
}

follow() {
  case $training in
    running)
      tell "the training runs"
      failures=0 suspect=''
      pause
      ;;
    stopped) fail "the training was stopped: watch again to go on" 1 ;;
    'exited 2') give_up ;;
    *)
      if [ -z "$suspect" ]; then
        # The end of the machine may follow the end of the program.
        suspect=$training
        pause
      elif [[ $training == exited\ [1-9]* ]]; then
        give_up
      else
        say "the training ended before its end ($training): starting it again"
        failures=$((failures + 1)) suspect=''
        start
      fi
      ;;
  esac
}

give_up() {
  say "the last lines of the log of worker 0:"
  on_workers 0 "tail -n 30 simclr_run/log" || true
  fail "the training $training by itself: mend that, and watch again" "${training#exited }"
}

watch() {
  failures=0 started='' suspect=''
  while [ "$failures" -lt "$attempts" ]; do
    if ! advance; then
      failures=$((failures + 1))
      say "failed $failures of $attempts times in a row"
      pause
    fi
  done
  fail "gave up after $failures failures in a row" 1
}

case $verb in
  watch | create | status | stop) "$verb" ;;
  install) need_idle && install ;;
  run) need_idle && start ;;
  log) need_ready && on_workers 0 "tail -n 100 -F simclr_run/log" ;;
  delete)
    look
    if [ "$condition" = missing ]; then say "there is no $name"; else delete; fi
    ;;
esac

#!/usr/bin/env bash
# Submits one task to Slurm as one job, with a process for each GPU. Before its time limit the job saves a
# checkpoint and queues itself again, until WORKDIR/summary.json tells that the run is finished.
# usage: bash launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 [OPTIONS] \
#            -- --config=configs/imagenet.py --workdir=DIR [--config.KEY=VALUE ...]
#
# The repository and DIR have to be on a file system that all nodes share. What requirements.txt and
# launch/requirements-gpu.txt ask for is installed into .venv once, on the machine that submits (CUDA 12 and
# drivers from 525 on: ACCELERATOR=gpu12 before the command). What a run would refuse is refused before it is queued.
#
#   --cpus_per_task   cores of each process: they feed its GPU; python -m simclr_jax.plan tells how many it takes
#   --partition, --account, --qos, --constraint, --mem, --job_name   as sbatch takes them
#   --elsewhere   the data is on disks of the nodes, and cannot be checked from here
#   --dry_run   print the commands, one a line, and run none
set -euo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

nodes='' gpus_per_node='' time='' elsewhere=''
optional="partition account qos constraint cpus_per_task mem job_name"
for option in $optional; do printf -v "$option" ''; done
read_options "nodes gpus_per_node time $optional" "dry_run elsewhere" "$@"
need nodes 2
need gpus_per_node 8
need time 24:00:00
[[ $gpus_per_node =~ ^[1-9][0-9]*$ ]] ||
  fail "--gpus_per_node=$gpus_per_node is no number: give it as in --gpus_per_node=8"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes is no number: give it as in --nodes=2"
[[ $time =~ ^([0-9]+|[0-9]+:[0-9]+(:[0-9]+)?|[0-9]+-[0-9]+(:[0-9]+){0,2})$ ]] ||
  fail "--time=$time is no time: give minutes, hours:minutes:seconds or days-hours, as in --time=24:00:00"
need_config
workdir=$(main_flag workdir)
[ -n "$workdir" ] || fail "--workdir is missing: give a folder that all nodes share, after --"
[[ $workdir != *://* ]] || fail "--workdir=$workdir is no folder: give one that all nodes share"
find_configs "${arguments[@]}"

submit=(
  sbatch "--nodes=$nodes" "--gpus-per-node=$gpus_per_node" "--ntasks-per-node=$gpus_per_node"
  "--time=$time"
  --signal=TERM@120 # to the processes, not to the script: they save and exit with 0
  --requeue --open-mode=append "--output=${workdir//%/%%}/slurm-%j.log"
)
for option in $optional; do
  [ -z "${!option}" ] || submit+=("--${option//_/-}=${!option}")
done

say "preparing the environment that all processes share"
call env "ACCELERATOR=${ACCELERATOR:-gpu}" bash "$ROOT/launch/environment.sh"
check_run "--nodes=$nodes" "--gpus_per_node=$gpus_per_node" ${elsewhere:+--elsewhere}
[ -n "$cpus_per_task" ] || echo "note: a process may get one core only: give --cpus_per_task=N, the cores that" \
  "the plan of --topology=h100:$gpus_per_node has for a host, divided by $gpus_per_node" >&2
call mkdir -p "$workdir"
say "submitting; the log is $workdir/slurm-JOB.log"
call "${submit[@]}" "$ROOT/launch/slurm_job.sh" "$ROOT" "$workdir" "${arguments[@]}"

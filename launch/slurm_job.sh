#!/usr/bin/env bash
# The job that slurm.sh submits.
# usage: sbatch [OPTIONS] launch/slurm_job.sh ROOT WORKDIR MAIN ARGUMENTS...
set -euo pipefail
root=$1 workdir=$2
shift 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# The time limit's signal goes to the processes alone; one that comes here is of somebody who cancels the job.
cancelled=''
trap 'cancelled=yes' TERM

# jax drives GPU i of a node by its process i, so that each has to see them all.
processes=(srun --gpu-bind=none --kill-on-bad-exit=1)
# srun does not take this from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || processes+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
"${processes[@]}" "$root/.venv/bin/python" -m simclr_jax.main "$@"

if [ -n "$cancelled" ]; then
  exit 143
elif [ ! -e "$workdir/summary.json" ]; then
  echo "== stopped before its end, with a checkpoint: queueing job $SLURM_JOB_ID again"
  scontrol requeue "$SLURM_JOB_ID"
fi

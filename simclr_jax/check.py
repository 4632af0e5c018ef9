"""Tells whether a run would be refused, before anything is queued or paid for: a trial of it, up to its work.

    python -m simclr_jax.check --config=FILE --workdir=DIR [--topology=v4-256] [--config.KEY=VALUE ...]

It checks what the run itself checks, by the same code: keys and values, the batch over devices, processes and
microbatches, the workdir, weights, and of the data its list of files, labels by CSV and the first images. It
writes nothing. With --topology or --nodes it starts no device. Exits with 2 and one line where the run would
be refused.

examples:
  python -m simclr_jax.check --config=configs/digits.py --workdir=RUN
      on the devices of this machine
  python -m simclr_jax.check --config=configs/imagenet.py --workdir=RUN --nodes=2 --gpus_per_node=8
      under Slurm, with a process for each GPU
  python -m simclr_jax.check --config=configs/imagenet.py --workdir=gs://BUCKET/RUN --topology=v4-256 \\
          --elsewhere
      on a slice of Cloud TPU, whose disks cannot be seen from here
"""

import tempfile
from pathlib import Path

import jax
from absl import flags
from etils import epath

from simclr_jax import parallel, pretrained, runs, train
from simclr_jax.config import command_line
from simclr_jax.plan import topologies
from simclr_jax.process import UserError, files, machine, say, trial

# The plan has this flag, too, and tests have both.
_TOPOLOGY = flags.DEFINE_string("topology", "local", "As v4-256 or h100:8, or 'local'.", allow_override=True)
_NODES = flags.DEFINE_integer("nodes", None, "Nodes of a Slurm job; needs gpus_per_node.", lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus_per_node", None, "GPUs of each, with a process each.", lower_bound=1)
_ELSEWHERE = flags.DEFINE_boolean("elsewhere", False, "Notes what cannot be seen from here, and goes on.")


def check(_) -> None:
    config = command_line.read_config()
    workdir = command_line.workdir(config)
    devices, processes, words = _machines()
    if devices:  # The CPU stands for them.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        parallel.planned_processes = processes
    else:
        machine.use_cores(config.batch_size // train.microbatches_of(config))
    place = config.dataset.path if config.dataset.name == "folder" else config.dataset.data_dir
    sees_data = config.dataset.name == "digits" or _is_seen("data", place)
    if config.pretrained and not _is_seen("weights", config.pretrained):
        sees_data, config.pretrained = False, None
    pretrained.inherit_settings(config, command_line.given())
    with tempfile.TemporaryDirectory() as stand_in:
        workdir = workdir if files.is_local(workdir) or _is_seen("workdir", workdir) else epath.Path(stand_in)
        made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        try:
            with trial.of(words, sees=sees_data):
                runs.run(config, workdir, command_line.defaults().to_dict())
        finally:
            _ = [folder.rmdir() for folder in made if folder.exists()]
    say(f"the run would begin{f' on {words}' if words else ''}")


def _machines():
    """Returns devices and processes of the machines that flags name, and both in words; or 0, 0 and ''."""
    if (_NODES.value is None) != (_GPUS.value is None) or (_NODES.value and _TOPOLOGY.value != "local"):
        raise UserError("give --nodes=N and --gpus_per_node=N together, or --topology=v4-256 alone")
    if _NODES.value:
        count = _NODES.value * _GPUS.value
        return count, count, f"{_NODES.value} nodes of {_GPUS.value} GPUs, with a process each"
    if _TOPOLOGY.value == "local":
        return 0, 0, ""
    topology = topologies.read(_TOPOLOGY.value)
    return *topology[1:], f"{topology.name}, {topology.devices} devices, {topology.hosts} host(s)"


def _is_seen(what, place):
    """Returns whether a place can be read from here; says where `--elsewhere` lets it be out of sight."""
    if not _ELSEWHERE.value:
        return True
    try:
        files.check_reachable(place or "")
        seen = place and (not files.is_local(place) or Path(place).expanduser().exists())
    except UserError:
        seen = False
    if not seen:
        where = place or "in a folder of its own"
        say(f"note: {what} ({where}) cannot be seen from here, and is not checked")
    return bool(seen)


if __name__ == "__main__":
    command_line.run(check)

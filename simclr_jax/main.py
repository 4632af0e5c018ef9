"""Runs one task: `python -m simclr_jax.main --config=configs/digits.py --workdir=DIR`."""

from simclr_jax.process import stopping  # before jax, whose import takes seconds

if __name__ == "__main__":
    stopping.take_signals()

import shlex

import jax

from simclr_jax import pretrained, runs, train
from simclr_jax.config import command_line
from simclr_jax.process import escape, files, group, machine
from simclr_jax.workdir import report


def main(_) -> None:
    group.join(**command_line.this_process(), timeout=command_line.join_timeout())
    config = command_line.read_config()
    machine.use_cores(config.batch_size // train.microbatches_of(config))
    pretrained.inherit_settings(config, command_line.given())
    workdir = command_line.workdir(config)
    if config.keep_compiled and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", machine.folder_of_programs(workdir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        summary = runs.run(config, workdir, command_line.defaults().to_dict())
    except stopping.Stopped:  # all processes stop after the same step
        group.announce_end()
        raise
    group.announce_end()
    if commands := _next_commands(config, workdir, summary):
        report.say("\n  next:  " + "\n         ".join(commands))


def _next_commands(config, workdir, summary):
    """Lists the commands that may follow a task."""
    run = shlex.quote(escape(workdir))
    look = [f"python -m simclr_jax look {run}"] if files.is_local(workdir) else []
    finetune = f"python -m simclr_jax finetune {run} --labels=labels.csv"
    if "similarity" in summary:  # A student of embeddings has no classifier.
        return [*look, finetune]
    if config.task == "pretrain":  # look suggests images to label
        classify = f"python -m simclr_jax linear_eval {run}" if "trained" in summary else finetune
        return [*look, f"tensorboard --logdir {run}", classify]
    if config.task in ("linear_eval", "finetune", "distill", "transfer"):
        return [f"python -m simclr_jax predict {run} PHOTOS"]
    return [f"python -m simclr_jax suggest {run}"] if config.task == "embed" else []


def run() -> None:
    """Runs this command; the entry point."""
    command_line.run(main)


if __name__ == "__main__":
    run()

"""Runs one task: `python -m simclr_jax.main --config=configs/digits.py --workdir=DIR`."""

import importlib
import json
import sys

import jax
from absl import app, flags, logging

from simclr_jax import checkpoint, command_line, metrics, parallel, train
from simclr_jax.errors import UserError


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries tell a lot at INFO; --verbosity=0 shows it
    parallel.initialize(**command_line.processes())
    config = command_line.read_config()
    workdir = command_line.workdir(config)
    train.check_batch_size(config.batch_size, jax.device_count())
    checkpoint.check_config(workdir, config.to_dict())
    summary = importlib.import_module(f"simclr_jax.tasks.{config.task}").run(config, workdir)
    if jax.process_index() == 0:
        checkpoint.save_config(workdir, config.to_dict())
        (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        metrics.print_summary(summary, workdir)


def run(command=main) -> None:
    """The entry point of a command line with a config: user errors are one line and exit code 2."""
    try:
        app.run(command, flags_parser=command_line.parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()

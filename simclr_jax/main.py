"""Runs one task: `python -m simclr_jax.main --config=configs/digits.py --workdir=DIR`."""

from simclr_jax import stopping  # jax comes after it: signals are taken before what takes seconds

if __name__ == "__main__":
    stopping.take()

import importlib
from contextlib import ExitStack

import jax
from absl import app, flags, logging

from simclr_jax import (
    checkpoint,
    command_line,
    errors,
    files,
    metrics,
    pretrained,
    processes,
    train,
    workdirs,
)
from simclr_jax.console import shown


def main(_) -> None:
    processes.join(**command_line.processes(), timeout=command_line.join_timeout())
    config = command_line.read_config()
    pretrained.adopt(config, command_line.given())
    workdir = command_line.workdir(config)
    processes.agree("config", workdirs.flatten(config.to_dict()) | {"workdir": str(workdir)})
    train.check_batch_size(config.batch_size, jax.device_count())
    with ExitStack() as stack:
        summary = processes.on_first(lambda: _begin(workdir, config, stack))
        if summary:
            metrics.say(f"{shown(workdir)} holds a run that is over: choose another --workdir for another")
        else:
            summary = importlib.import_module(f"simclr_jax.tasks.{config.task}").run(config, workdir)
            if jax.process_index() == 0:
                workdirs.save_config(workdir, config.to_dict())
                files.write_json(workdir / "summary.json", summary, indent=2)
        metrics.print_summary(summary, workdir)


def _begin(workdir, config, stack):
    """Takes the workdir for this run; returns the summary of one that is over."""
    files.check_reachable(workdir)
    workdirs.check_config(workdir, config.to_dict(), command_line.defaults().to_dict())
    if (summary := workdirs.read_summary(workdir)) and checkpoint.newest_is_whole(workdir):
        return summary
    workdirs.prepare(workdir)
    stack.enter_context(workdirs.locked(workdir))
    return None


def run(command=main) -> None:
    """The entry point of a command line with a config: user errors are one line and exit code 2."""
    with errors.told(processes.leave), stopping.handled():
        try:
            app.run(command, flags_parser=_parse)
        except errors.UserError:
            raise
        except Exception:
            processes.wait_for_verdict()
            raise


def _parse(argv):
    arguments = command_line.parse(argv)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # what libraries tell at ERROR becomes a line here
    return arguments


if __name__ == "__main__":
    run()

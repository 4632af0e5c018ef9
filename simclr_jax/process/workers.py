"""Workers of Apache Beam, the extra `beam`: processes of this machine, or other machines."""

import contextlib
import io
import shlex
from collections.abc import Callable

from etils import epy

from simclr_jax.process.console import escape
from simclr_jax.process.errors import RunError, UserError

_RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
_DIRECT = ("--direct_num_workers=0", "--direct_running_mode=multi_processing")  # all cores of this machine
_DIRECT += ("--default_sdk_harness_log_level=ERROR",)


def refuse_missing(error: ImportError) -> None:
    """Raises a UserError that tells how a package is installed; for `epy.lazy_imports`."""
    raise UserError(f"{error.name} is not installed: pip install {error.name.replace('_', '-')}") from None


with epy.lazy_imports(error_callback=refuse_missing):
    import apache_beam as beam


def make_options(flags: str):
    """Returns Beam's `PipelineOptions` of flags, one of which is --runner.

    Raises:
      UserError: Beam is not installed, the runner is none that is known, or a flag is wrong.
    """
    options, printed = beam.options.pipeline_options, io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            words = shlex.split(flags)
            runner = options.PipelineOptions(words).get_all_options()["runner"]
    except (ValueError, SystemExit) as error:
        reason = (printed.getvalue().strip() or str(error)).splitlines()[-1]
        raise UserError(f"{flags!r}: {reason}: expected flags of Beam, as --runner=DirectRunner") from None
    if runner not in _RUNNERS:
        raise UserError(f"--runner={runner}: expected {', '.join(_RUNNERS)}, as in --runner=DirectRunner")
    return options.PipelineOptions([*_DIRECT * (runner == "DirectRunner"), *words])


def run(function: Callable, elements: list, flags: str) -> None:
    """Calls a function with every element, in the workers that flags of Beam name.

    Raises:
      RunError: a worker failed.
    """
    try:
        with beam.Pipeline(options=make_options(flags)) as pipeline:
            _ = pipeline | beam.Create(elements) | beam.Reshuffle() | beam.Map(function)
    except Exception as error:  # Its text ends with the error of the worker, behind tracebacks.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].partition(" [while running")[0]
        raise RunError(f"a worker of Apache Beam failed: {escape(reason)}") from error

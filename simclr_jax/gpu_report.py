"""The command `python -m simclr_jax.gpu_report`, whose code is `simclr_jax.benchmark.gpu_report`."""

from absl import flags

from simclr_jax.benchmark import gpu_report
from simclr_jax.config import command_line

if __name__ == "__main__":
    __doc__ = gpu_report.__doc__  # shown by --help
    flags.adopt_module_key_flags(gpu_report)
    command_line.run(gpu_report.write_report)

"""The launcher that the environment names: Slurm, Open MPI or Kubernetes, as jax recognises them.

A shell in an allocation inherits its variables, and so does a Jupyter there. A command that is started in one
is alone, while jax would wait for processes that nobody starts.
"""

import os
import re
import socket

# The variable by which jax recognises a launcher -> what starts all processes, and what numbers them.
_LAUNCHERS = {
    "OMPI_MCA_orte_hnp_uri": ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "SLURM_STEP_NODELIST": ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
    "KUBERNETES_SERVICE_HOST": ("an Indexed Job", "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
}


def find() -> tuple[str, bool] | None:
    """Returns the ways out for a process that is alone, and whether a launcher surely started this process.

    None where jax would ask no launcher for the other processes.
    """
    mark = next((mark for mark in _LAUNCHERS if mark in os.environ), None)
    if mark is None or (mark.startswith("KUBERNETES") and "TPU_WORKER_HOSTNAMES" in os.environ):
        return None
    start, *names = _LAUNCHERS[mark]
    variables = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    ways_out = f"{variables} stand for one of several processes: give --num_processes=1 to run it alone, or "
    if start == "srun":  # The step of a batch script or of an allocation's shell has one task.
        started = os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("SLURM_NTASKS")
    elif start == "mpirun":
        started = _listens(os.environ[mark])
    else:
        started = names[0] in os.environ
    return f"{ways_out}start all of them by {start}", started


def _listens(uri):
    """Returns whether mpirun may still listen where it told its processes."""
    try:
        host, port = re.search(r"tcp6?://\[?([^,;\]]+).*?:(\d+)(?:;|$)", uri).groups()
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        return not isinstance(error, ConnectionRefusedError)
    return True

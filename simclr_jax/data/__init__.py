"""Input pipelines: TensorFlow on the host, which must never take accelerator memory."""

import contextlib
import os

# What fails raises too: 3 leaves out what TensorFlow logs beside, of iterators that end for one.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it prints a warning, for operations not used here
# malloc gives what an image took back to the system after each: 1,600 page faults an image.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
# XLA would share out each program among all cores, which other images keep busy: views would take 1.3 times
# as long on two.
with contextlib.suppress(RuntimeError):  # of programs that have used TensorFlow before
    tf.config.threading.set_intra_op_parallelism_threads(1)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

"""Input pipelines: TensorFlow on the host, which must never take accelerator memory."""

import contextlib
import importlib.util
import os

# At level 3, TensorFlow logs nothing; errors are raised all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints a warning, and is not used.
# malloc would return the memory of every image to the system: 1,600 page faults an image.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
# TensorFlow imports Keras at once, which takes a second, unless asked for an older one that is not there.
_asks = "TF_USE_LEGACY_KERAS" not in os.environ and importlib.util.find_spec("tf_keras") is None
if _asks:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tensorflow as tf

from simclr_jax.process import machine

if _asks:
    del os.environ["TF_USE_LEGACY_KERAS"]

try:
    tf.config.set_visible_devices([], "GPU")
except RuntimeError:
    print("note: the program has used TensorFlow with a GPU before, whose memory it may hold", flush=True)
# XLA would run each program on all cores, which other images keep busy: on two cores, views would take 1.3
# times as long.
with contextlib.suppress(RuntimeError):  # Raised in a program that has used TensorFlow before.
    tf.config.threading.set_intra_op_parallelism_threads(1)

CORES = machine.count_cores()


def eager_execution():
    """Makes a context in which TensorFlow executes at once, whatever mode the program has it in.

    `tf.init_scope` leaves neither a `tf.Graph` nor the mode of TensorFlow 1.
    """
    from tensorflow.python.eager import context

    return context.eager_mode()

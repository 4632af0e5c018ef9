"""Input pipelines: TensorFlow on the host, which must never take accelerator memory."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it prints a warning, for operations not used here

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

"""SimCLR on scikit-learn's handwritten digits: 1,797 real 8 x 8 images, learnt from in minutes on a laptop.

    python -m simclr_jax.main --config=configs/digits.py

Takes about three minutes on 2 CPU cores. Measured there, on the 360 held-out digits (2026-11-24, jax 0.10.2):
linear evaluation 98.9 % (raw pixels 96.1 %), nearest neighbours 97.2 % (96.7 %), and with five labels a
digit 89.9 % (83.6 %; the same encoder untrained 44.9 %). LARS and NT-Xent are as for ImageNet; the network
suits the images: the smallest of the CIFAR ResNets, with three eighths of the usual width.
"""

from configs import base


def pretrain():
    config = base.pretrain()
    config.batch_size = 256
    config.num_epochs = 60.0
    config.warmup_epochs = 4.0
    config.image_size = 16
    config.temperature = 0.2
    config.dataset.name = "digits"
    config.augment.min_area = 0.25
    config.augment.flip = False
    config.augment.color_jitter_strength = 0.75
    config.augment.blur = False
    config.model.depth = 8
    config.model.width = 0.375
    config.optimizer.learning_rate = 4.0
    config.log_every_steps = 20
    config.checkpoint_every_steps = 100
    return config


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

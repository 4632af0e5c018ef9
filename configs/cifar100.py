"""SimCLR on CIFAR-100: the recipe of cifar10.py, for which neither paper gives a result on these classes.

    tfds build cifar100
    python -m simclr_jax.main --config=configs/cifar100.py

Cost: as cifar10.py.
"""

from configs import base, cifar10


def pretrain():
    config = cifar10.pretrain()
    config.dataset.name = "cifar100"
    return config


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

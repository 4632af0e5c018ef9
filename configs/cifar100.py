"""SimCLR on CIFAR-100: the recipes of cifar10.py, for which neither paper gives a result on these classes.

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar100').download_and_prepare()"
    python -m simclr_jax.main --config=configs/cifar100.py --workdir=RUN

The tasks, their commands and their cost are those of cifar10.py; one percent of the labels is 5 a class here.
"""

from configs import cifar10


def get_config(task=None):
    config = cifar10.get_config(task)
    config.dataset.name = "cifar100"
    if config.task == "finetune" and config.labels_per_class:
        config.labels_per_class //= 10
    return config

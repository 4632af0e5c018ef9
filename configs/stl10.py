"""SimCLR on the 100,000 unlabelled images of STL-10; features are judged on its labelled splits.

    tfds build stl10
    python -m simclr_jax.main --config=configs/stl10.py

The recipe is cifar10.py's with blur, at the images' own 96 pixels; neither paper gives a result for it. The
undecoded images take about 2.6 GB of memory a host.
"""

from configs import base, cifar10


def pretrain():
    config = cifar10.pretrain()
    config.num_epochs = 200.0
    config.image_size = 96
    config.augment.blur = True
    config.dataset.name = "stl10"
    config.dataset.train_split = "unlabelled"
    config.dataset.probe_split = "train"
    return config


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

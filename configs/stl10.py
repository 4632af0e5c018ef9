r"""SimCLR on the 100,000 unlabelled images of STL-10; features are judged on its labelled splits.

    python -c "import tensorflow_datasets as tfds; tfds.builder('stl10').download_and_prepare()"
    python -m simclr_jax.main --config=configs/stl10.py --workdir=RUN
    python -m simclr_jax.main --config=configs/stl10.py:linear_eval --config.pretrained=RUN \
        --workdir=RUN/linear_eval

The recipe is that of cifar10.py with blur, at the images' size of 96 pixels; neither paper gives a result for
it. The undecoded images take about 2.6 GB of memory on every host. The other tasks are those of cifar10.py,
on the 5,000 labelled training images (finetune_1pct: 5 labels a class, finetune_10pct: 50); distill and embed
take the unlabelled ones.
"""

from configs import cifar10


def get_config(task=None):
    config = cifar10.get_config(task)
    config.image_size = 96
    config.dataset.name = "stl10"
    if config.task == "pretrain":
        config.num_epochs = 200.0
        config.augment.blur = True
        config.dataset.probe_split = "train"
    if config.task in ("pretrain", "distill", "embed"):
        config.dataset.train_split = "unlabelled"
    if config.task == "finetune" and config.labels_per_class:
        config.labels_per_class //= 10
    return config

r"""SimCLR on CIFAR-10: ResNet-18 with the stem for small images (arXiv 2002.05709, appendix B.9).

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10').download_and_prepare()"
    python -m simclr_jax.main --config=configs/cifar10.py --workdir=RUN
    python -m simclr_jax.main --config=configs/cifar10.py:linear_eval --config.pretrained=RUN \
        --workdir=RUN/linear_eval

The settings are those of the official repository's README, which reports about 91 % in linear evaluation
after 1,000 epochs (97,657 steps). Cost: a view takes 0.56 billion multiply-adds in the forward pass, so a
step takes about 3.4 TFLOP; the 100 epochs of linear evaluation are forward passes only.

pretrain_200 is the same recipe in 200 epochs. After so many, lightly's benchmark reaches 84.8 % by nearest
neighbours, in 87 minutes on an A6000, and 87.9 % after 800 epochs; solo-learn reaches 90.7 % in linear
evaluation after 1,000. One command trains for 200 and for 1,000 epochs, evaluates both, and writes a table;
after a stop the same command goes on. PHOTOS holds all 60,000 photographs as files, in train/CLASS/ and
test/CLASS/:

    bash launch/cifar10.sh PHOTOS

finetune, finetune_1pct (50 labels a class), finetune_10pct (500), knn, transfer and embed start from RUN in
the same way. distill starts from a fine-tuned run such as RUN/finetune_1pct and trains a network of half the
width. Neither paper gives figures for these tasks.
"""

from configs import base


def pretrain():
    config = base.pretrain()
    config.batch_size = 512
    config.num_epochs = 1000.0
    config.image_size = 32
    config.temperature = 0.5
    config.dataset.name = "cifar10"
    config.augment.color_jitter_strength = 0.5
    config.augment.blur = False
    config.model.depth = 18
    config.model.projection_layers = 3
    config.optimizer.learning_rate = 1.0
    config.optimizer.weight_decay = 1e-4
    config.evaluate.every_epochs = 50.0
    return config


def pretrain_200():
    config = pretrain()
    config.num_epochs = 200.0
    config.evaluate.every_epochs = 20.0
    return config


def linear_eval():
    config = base.linear_eval(pretrain())
    config.num_epochs = 100.0
    return config


def finetune():
    config = base.finetune(pretrain())
    config.num_epochs = 30.0
    return config


def finetune_1pct():
    config = base.finetune(pretrain())
    config.labels_per_class = 50
    return config


def finetune_10pct():
    config = finetune()
    config.labels_per_class = 500
    return config


def distill():
    config = base.distill(pretrain())
    config.model.width = 0.5
    return config


def get_config(task=None):
    own = (pretrain, pretrain_200, linear_eval, finetune, finetune_1pct, finetune_10pct, distill)
    return base.task_config(task, *own)

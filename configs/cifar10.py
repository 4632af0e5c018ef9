"""SimCLR on CIFAR-10: ResNet-18 with the stem for small images (arXiv 2002.05709, appendix B.9).

    tfds build cifar10
    python -m simclr_jax.main --config=configs/cifar10.py

The settings are those of the official repository's README, which reports about 91 % in linear evaluation
after 1,000 epochs (97,657 steps). Cost: 0.56 billion multiply-adds a view forward, so about 3.4 TFLOP a
step.
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


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

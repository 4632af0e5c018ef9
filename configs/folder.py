"""SimCLR on a folder of your own images; no labels are needed.

    python -m simclr_jax.main --config=configs/folder.py --config.dataset.path=PHOTOS --workdir=RUN

PHOTOS holds JPEG, PNG, WebP, BMP or GIF files, nested as you like. Two or more sub-folders of images are
taken as classes: the encoder never sees them, but they tell how good it is. `train/` and `val/` are taken
as splits; otherwise a tenth of the images is held out.

The defaults suit one GPU and some thousand images; 2 CPU cores take about 4 s a step of 128 images. With
more of either: `--config.image_size=224 --config.model.depth=50 --config.batch_size=512`. More epochs help
small folders most. Where colour tells images apart that are otherwise alike (stains, say), lower
`--config.augment.color_jitter_strength`.
"""

from configs import base


def pretrain():
    config = base.pretrain()
    config.batch_size = 128
    config.num_epochs = 100.0
    config.image_size = 96
    config.temperature = 0.2
    config.dataset.name = "folder"
    config.augment.color_jitter_strength = 0.5
    config.model.depth = 18
    config.optimizer.learning_rate = 1.0
    config.optimizer.weight_decay = 1e-4
    config.log_every_steps = 10
    config.checkpoint_every_steps = 20
    return config


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

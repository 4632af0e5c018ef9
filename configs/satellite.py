"""SimCLR on a folder of satellite images: any number of bands, as GeoTIFF of 8 to 32 bits.

    python -m simclr_jax.main --config=configs/satellite.py --config.dataset.path=PATCHES --workdir=RUN

Keep places or days together by `--config.dataset.group`. `configs/folder.py` describes the rest, which is the
same. Nothing was trained with it here on images of satellites.
"""

from configs import base, folder


def pretrain():
    config = folder.pretrain()
    # From above there is no up: all eight turns and mirrors are as likely.
    config.augment.vertical_flip = True
    config.augment.rotate = True
    # A pixel is a fixed area on the ground, so that scale carries meaning. This and the next two numbers, and
    # that views lose bands, are from the MoCo of SSL4EO-S12 (arXiv 2211.07044) on 13 bands of Sentinel-2.
    config.augment.min_area = 0.2
    config.augment.brightness = 0.4
    config.augment.contrast = 0.4
    config.augment.drop_channel = 0.5
    # The colour of land is its class: of images with three bands, hue and saturation hardly change.
    config.augment.saturation = 0.2
    config.augment.hue = 0.05
    return config


def finetune():
    return folder.finetune_from(pretrain())


def get_config(task=None):
    return base.task_config(task, pretrain, finetune)

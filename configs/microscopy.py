"""SimCLR on a folder of microscope images: any number of channels, 8 to 32 bits, TIFF and OME-TIFF.

    python -m simclr_jax.main --config=configs/microscopy.py --config.dataset.path=SLIDES --workdir=RUN

Images have neither an up nor a hue. Keep patients or plates together by `--config.dataset.group`: a level of
sub-folders, or a column of the CSV file of labels. `configs/folder.py` describes the rest, which is the same.
The choices below follow from how such images are made; none was compared with others here. What views may
change decides what is learnt (Bendidi et al. 2024, Biological Imaging): undo what your classes differ in.
"""

from configs import base, folder


def pretrain():
    config = folder.pretrain()
    # A cell lies in any direction, so all eight turns and mirrors are as likely.
    config.augment.vertical_flip = True
    config.augment.rotate = True
    # The size of cells carries meaning, and crops of all sizes would hide it.
    config.augment.min_area = 0.3
    # Stains and exposure vary between slides; a channel is a marker, so no view mixes them into grey.
    config.augment.brightness = 0.4
    config.augment.contrast = 0.4
    config.augment.saturation = 0.2
    config.augment.hue = 0.05
    config.augment.grayscale = 0.0
    # A camera counts photons: noise of Poisson and Gaussian (Foi et al. 2008, IEEE TIP 17 (10)).
    config.augment.noise = 0.05
    return config


def finetune():
    return folder.finetune_from(pretrain())


def get_config(task=None):
    return base.task_config(task, pretrain, finetune)

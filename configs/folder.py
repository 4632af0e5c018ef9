r"""SimCLR on a folder of your own images; no labels are needed.

    simclr-jax pretrain PHOTOS --workdir=RUN       # or, as long,
    python -m simclr_jax.main --config=configs/folder.py --config.dataset.path=PHOTOS --workdir=RUN

PHOTOS holds JPEG, PNG, WebP, BMP, GIF, TIFF and other files, in sub-folders of any depth. They are read as
photo programs show them: turned by their orientation tag, transparency on white, the first frame of an
animation. Images of more than 8 bits are scaled by one range, which is told from some of them or set with
`--config.dataset.value_range='(0, 4095)'`; docs/images.md describes them, and other numbers of channels.
`train/` and `val/` are taken as splits; without them about a tenth of the images is held out, by a hash of
seed and path. Two or more sub-folders are taken as classes: the encoder is trained without them, and its
scores are measured with them. `--config.dataset.classes=False` takes no classes. At its start a run prints
which splits and classes it took, and which files it skipped.

With fewer than some ten thousand images start from published weights, as by
`--config.pretrained=resnet50.safetensors`: docs/published.md tells where to get them. From scratch on a
laptop, 3,000 photographs of ten classes gave in 60 epochs, 24 minutes on 2 CPU cores (2026-11-26), nearest
neighbours of 45 % against 29 % on raw pixels and a linear classifier of 45 % against 26 %, with

    --config.image_size=32 --config.batch_size=256 --config.num_epochs=60 \
        --config.model.depth=8 --config.model.width=0.75 --config.model.stem=imagenet

The defaults suit one GPU and some thousand images; 2 CPU cores take about 4 s for a step of 128 images.
With more GPUs or images, use `--config.image_size=224 --config.model.depth=50 --config.batch_size=512`.
More epochs help small folders most. Where images differ in colour alone (stains, say), lower
`--config.augment.color_jitter_strength`.

Then label some images; docs/labels.md shows these steps with their figures. `look` draws a page that shows
what was learnt and takes labels; `suggest` writes a CSV file of the images to label first instead, whose
column `label` you fill in. Train a classifier on those labels, and let it predict the labels of other images:

    simclr-jax look RUN
    simclr-jax finetune RUN --labels=labels.csv
    simclr-jax predict RUN/classifier NEW

linear_eval, knn and transfer take labels by sub-folders or by CSV as well; transfer, logistic regression on
the features, is the fastest. All labels are used; with sub-folders `--config.labels_per_class=10
--config.evaluate.compare=True` measures the accuracy with so few, with pretraining and without. distill
starts from a run of finetune, and embed writes the features as files.
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


def finetune():
    return finetune_from(pretrain())


def finetune_from(pretraining):
    """Makes the config of fine-tuning on a few dozen labels from that of pretraining."""
    config = base.finetune(pretraining)
    config.batch_size = 32
    config.num_steps = 300
    config.optimizer.learning_rate = 0.01  # 0.06 for these 32; linear scaling would leave a few labels 0.006
    config.optimizer.scaling = "sqrt"
    return config


def distill():
    config = base.distill(pretrain())
    config.num_epochs = 100.0
    config.warmup_epochs = 10.0
    config.model.width = 0.5
    config.evaluate.compare = True
    return config


def knn():
    config = base.knn(pretrain())
    config.k = 20
    return config


def get_config(task=None):
    return base.task_config(task, pretrain, finetune, distill, knn)

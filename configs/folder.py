r"""SimCLR on a folder of your own images; no labels are needed.

    python -m simclr_jax.main --config=configs/folder.py --config.dataset.path=PHOTOS --workdir=RUN

PHOTOS holds JPEG, PNG, WebP, BMP or GIF files, nested as you like. They are read as photo programs show them:
turned by their tag, transparency on white, the first frame of an animation; 16 bits are scaled by one range,
told from all of them or set with `--config.dataset.value_range='(0, 4095)'`. `train/` and `val/` are taken as
splits; otherwise about a tenth of the images is held out, by a hash of seed and path. Two or more sub-folders
are taken as classes: the encoder never sees them, but they tell how good it is;
`--config.dataset.classes=False` takes none. The start says what was taken for what, skipped and left out.

With fewer than some ten thousand images start from published weights, as by
`--config.pretrained=resnet50.safetensors`: docs/published.md tells where to get them. From scratch, an
afternoon on a laptop does this much (3,000 photographs of ten classes, 60 epochs, 24 minutes on 2 CPU cores,
2026-11-26: nearest neighbours 45 % against 29 % on raw pixels, a linear classifier 45 % against 26 %):

    --config.image_size=32 --config.batch_size=256 --config.num_epochs=60 \
        --config.model.depth=8 --config.model.width=0.75 --config.model.stem=imagenet

The defaults suit one GPU and some thousand images; 2 CPU cores take about 4 s a step of 128 images. With
more of either: `--config.image_size=224 --config.model.depth=50 --config.batch_size=512`. More epochs help
small folders most. Where colour tells images apart that are otherwise alike (stains, say), lower
`--config.augment.color_jitter_strength`.

Then (docs/labels.md has this road with its figures) `python -m simclr_jax.plots RUN` draws a page, where to
look at what was learnt and to label some images; or `python -m simclr_jax.evaluation.suggest RUN` writes
which to label first, as a CSV file whose column `label` is filled in. A classifier from those labels, and
what it says of other images:

    python -m simclr_jax.main --config=configs/folder.py:finetune --config.dataset.path=PHOTOS \
        --config.dataset.labels=labels.csv --config.pretrained=RUN --workdir=RUN/classifier
    python -m simclr_jax.main --config=configs/folder.py:predict --config.dataset.path=NEW \
        --config.pretrained=RUN/classifier --workdir=RUN/predicted

Labels by sub-folders or by CSV serve linear_eval, knn and transfer as well; transfer, logistic regression on
the features, is the fastest. All labels are used; with sub-folders `--config.labels_per_class=10
--config.evaluate.compare=True` shows what so few are worth, with pretraining and without. distill starts from
a finetune run, and `:embed` writes the features as files.
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
    config = base.finetune(pretrain())
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

r"""SimCLR on a folder of your own images; no labels are needed.

    python -m simclr_jax.main --config=configs/folder.py --config.dataset.path=PHOTOS --workdir=RUN

PHOTOS holds JPEG, PNG, WebP, BMP or GIF files, nested as you like. They are read as photo programs show them:
turned by their tag, transparency on white, the first frame of an animation; 16 bits are scaled by one range,
told from all of them or set with `--config.dataset.value_range='(0, 4095)'`. `train/` and `val/` are taken as
splits; otherwise about a tenth of the images is held out, by a hash of seed and path. Two or more sub-folders
are taken as classes: the encoder never sees them, but they tell how good it is;
`--config.dataset.classes=False` takes none. The start says what was taken for what, skipped and left out.

With fewer than some ten thousand images start from published weights, as by
`--config.pretrained=resnet50.safetensors`: docs/published.md tells where to get them.

The defaults suit one GPU and some thousand images; 2 CPU cores take about 4 s a step of 128 images. With
more of either: `--config.image_size=224 --config.model.depth=50 --config.batch_size=512`. More epochs help
small folders most. Where colour tells images apart that are otherwise alike (stains, say), lower
`--config.augment.color_jitter_strength`.

Without labels, `python -m simclr_jax.plots RUN` shows whether the features are any good: their health over
time, the nearest neighbours of some images and a map of all. The features themselves, as files:

    python -m simclr_jax.main --config=configs/folder.py:embed --config.dataset.path=PHOTOS \
        --config.pretrained=RUN --workdir=RUN/embed

With classes: linear_eval, knn, transfer, and finetune, by default with 10 labels a class and beside the same
network from scratch; distill starts from a finetune run.
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


def linear_eval():
    return base.linear_eval(pretrain())


def finetune():
    config = base.finetune(pretrain())
    config.num_steps = 500
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


def transfer():
    return base.transfer(pretrain())


def embed():
    return base.embed(pretrain())


def predict():
    return base.predict(pretrain())


def get_config(task=None):
    return base.task_config(task, pretrain, linear_eval, finetune, distill, knn, transfer, embed, predict)

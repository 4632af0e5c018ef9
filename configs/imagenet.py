r"""SimCLR on ImageNet (arXiv 2002.05709): ResNet-50, global batch 8192, LARS, NT-Xent at 0.1, 2-layer head.

    python -m simclr_jax.main --config=configs/imagenet.py --workdir=gs://BUCKET/RUN \
        --config.dataset.data_dir=gs://BUCKET/tensorflow_datasets

The paper trains on 128 TPU v3 cores, where 100 epochs at batch 4096 take about 1.5 hours (section 2.2).
Prepare ImageNet once, from the archives of image-net.org in `DATA_DIR/downloads/manual`, and its subsets for
few labels, with 'imagenet2012', 'imagenet2012_subset/1pct' and 'imagenet2012_subset/10pct' as NAME:

    python -c "import tensorflow_datasets as tfds; \
        tfds.builder(NAME, data_dir='DATA_DIR').download_and_prepare()"

The other tasks start from that run: `--config=configs/imagenet.py:TASK --config.pretrained=gs://BUCKET/RUN
--workdir=gs://BUCKET/RUN/TASK`. The paper's results for ResNet-50 1x, 2x and 4x (`--config.model.width=2` or
4), pretrained for 1,000 epochs at batch 4096:

    linear_eval     69.3, 74.2, 76.5 % top-1 (table 6); 64.5 % after 100 epochs (README of the official code)
    finetune_1pct   75.5, 83.0, 85.8 % top-5 (table 7)
    finetune_10pct  87.8, 91.2, 92.6 % top-5 (table 7)
    finetune        75.6, 79.2, 80.8 % top-1 (the official code's checkpoints)
    distill         trains a student like its fine-tuned teacher; --config.model.width=1 for a smaller student
    knn             no figure in the paper
    transfer        logistic regression on another dataset: Flowers 95.0 % of each class with 4x (table 8), by
                    --config.dataset.name=oxford_flowers102 --config.dataset.eval_split=test
                    --config.dataset.validation_split=validation --config.metric=mean_per_class
    embed           features of all images: 2,048 numbers each, 11 GB in all

linear_eval takes 90 epochs of forward passes, finetune 30 epochs, finetune_1pct 188 steps, finetune_10pct 939
steps, knn and embed one pass over the images.

One device holds batch 8192 with `--config.microbatches=64 --config.remat=True`: it takes 10 GiB instead of
416, and longer (docs/large_batches.md). To learn what a topology would take before you rent it, run `python
-m simclr_jax.plan --config=configs/imagenet.py --topology=v4:4x4x8`.

RUN may also be a checkpoint of google-research/simclr, as downloaded: `--config.pretrained=ResNet50_1x`.
These settings suit v1's checkpoints. The kernels of v2's are 16.8 times smaller, from another weight decay:
fine-tune them by LARS, as configs/imagenet_v2.py does, or search SGD's learning rate and weight decay anew
(simclr_jax/official/ tells more).

Where the host's cores cannot feed its accelerators, which `data_wait` in the log and the planner show,
`--config.augment.on_device=True` distorts the views in the train step: the host needs half of its time,
the accelerator a twentieth more (docs/accelerators.md).

For other batch sizes the paper scales the learning rate linearly, as here; appendix B.1 finds
`--config.optimizer.learning_rate=0.075 --config.optimizer.scaling=sqrt` better for small batches and few
epochs.
"""

from configs import base


def pretrain():
    config = base.pretrain()
    config.batch_size = 8192
    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.dataset.in_memory = False
    config.evaluate.compare = False
    config.checkpoint_every_steps = 500
    return config


def linear_eval():
    config = base.linear_eval(pretrain())
    config.batch_size = 4096
    config.optimizer.weight_decay = 1e-6
    return config


def finetune():
    config = base.finetune(pretrain())
    config.batch_size = 4096
    config.num_epochs = 30.0
    return config


def finetune_1pct():
    config = finetune()
    config.num_epochs = 60.0
    config.dataset.name = "imagenet2012_subset/1pct"
    config.dataset.in_memory = True
    return config


def finetune_10pct():
    config = finetune()
    config.dataset.name = "imagenet2012_subset/10pct"
    return config


def distill():
    config = base.distill(pretrain())
    config.batch_size = 4096
    return config


def get_config(task=None):
    config = base.task_config(task, pretrain, linear_eval, finetune, finetune_1pct, finetune_10pct, distill)
    if config.task in ("knn", "transfer", "embed", "predict"):  # forward only
        config.batch_size = 1024
    return config

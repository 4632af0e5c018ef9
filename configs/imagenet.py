r"""SimCLR on ImageNet (arXiv 2002.05709): ResNet-50, global batch 8192, LARS, NT-Xent at 0.1, 2-layer head.

    python -m simclr_jax.main --config=configs/imagenet.py --workdir=gs://BUCKET/RUN \
        --config.dataset.data_dir=gs://BUCKET/tensorflow_datasets

Expected linear evaluation, ResNet-50, top-1: 69.3 % after 1,000 epochs at batch 4096 (the paper's table 6),
about 64.5 % after 100 epochs at batch 4096 (the official repository's README). The paper trains on 128 TPU
v3 cores, where 100 epochs at batch 4096 take about 1.5 hours (section 2.2). Wider: `--config.model.width=2`
or 4, 74.2 % and 76.5 % (table 6).

ImageNet has to be prepared once, from the archives of image-net.org in `DATA_DIR/downloads/manual`:

    tfds build imagenet2012 --data_dir=DATA_DIR

For other batch sizes the paper scales the learning rate linearly, as here; appendix B.1 finds
`--config.optimizer.learning_rate=0.075 --config.optimizer.scaling=sqrt` better for small batches and few
epochs. A labelled percent alone: `--config.dataset.name=imagenet2012_subset/1pct
--config.dataset.in_memory=True`.
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


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

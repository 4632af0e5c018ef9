r"""SimCLR v2 on ImageNet (arXiv 2006.10029): ResNet-152 3x with selective kernels and a 3-layer head.

    python -m simclr_jax.main --config=configs/imagenet_v2.py --workdir=gs://BUCKET/RUN \
        --config.dataset.data_dir=gs://BUCKET/tensorflow_datasets

Expected linear evaluation: 79.8 % top-1 for this network (the paper's table 1). Smaller ones by
`--config.model.depth=50 --config.model.width=1 --config.model.sk_ratio=0`: 71.7 % in the paper, with a
memory of negatives that is not here; 71.1 % without it (the authors, in the official repository's issue
77). The paper trains 800 epochs at batch 4096 on 128 TPUs (section 3).
"""

from configs import base, imagenet


def pretrain():
    config = imagenet.pretrain()
    config.batch_size = 4096
    config.num_epochs = 800.0
    config.warmup_epochs = 40.0
    config.model.depth = 152
    config.model.width = 3.0
    config.model.sk_ratio = 0.0625
    config.model.projection_layers = 3
    config.optimizer.learning_rate = 0.1
    config.optimizer.scaling = "sqrt"
    config.optimizer.weight_decay = 1e-4
    return config


def get_config(task=None):
    return base.task_config({"pretrain": pretrain}, task)

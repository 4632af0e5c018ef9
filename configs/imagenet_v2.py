r"""SimCLR v2 on ImageNet (arXiv 2006.10029): ResNet-152 3x with selective kernels and a 3-layer head.

    python -m simclr_jax.main --config=configs/imagenet_v2.py --workdir=gs://BUCKET/RUN \
        --config.dataset.data_dir=gs://BUCKET/tensorflow_datasets

The paper trains 800 epochs at batch 4096 on 128 TPUs (section 3). Two tasks follow, each from the run before:

    ... --config=configs/imagenet_v2.py:finetune_1pct --config.pretrained=gs://BUCKET/RUN \
        --workdir=gs://BUCKET/RUN/finetune_1pct
    ... --config=configs/imagenet_v2.py:distill --config.pretrained=gs://BUCKET/RUN/finetune_1pct \
        --workdir=gs://BUCKET/RUN/distill

Fine-tuning on few labels puts the classifier on the first layer of the projection head, which is trained,
too; fine-tuning on all labels puts it on the features (section 3). `distill` trains a ResNet-50, the
student, to predict what the fine-tuned network does on all images, in 400 epochs. A student like its
teacher takes `--config.model.depth=152 --config.model.width=3 --config.model.sk_ratio=0.0625
--config.temperature=0.1`. The paper's results, top-1:

                    ResNet-152 3x + SK    ResNet-50
    linear_eval                 79.8 %       71.7 %    table 1
    finetune_1pct               74.9 %       57.9 %    table 1
    finetune_10pct              80.1 %       68.4 %    table 1
    finetune                    83.1 %       76.3 %    table 1
    distill, 1 %                76.6 %       73.9 %    self-distilled; ResNet-50 taught by ResNet-152 3x + SK
    distill, 10 %               80.9 %       77.5 %    likewise

RUN may also be one of the 65 networks that Google published, as downloaded, with `--config.model` as in its
name: `--config.pretrained=r152_3x_sk1`. Classifiers that were trained on few labels read layer 1 of the
projection head (section 3), which the files do not tell. To distill such a network, convert it first, by
`python -m simclr_jax.official r152_3x_sk1 --output RUN/finetune_1pct --supervised_layer=1`. LARS, as here,
suits v1's and v2's networks alike; for SGD mind that v2's kernels are 16.8 times smaller
(simclr_jax/official/).

Pretraining keeps a memory of 65,536 negatives by a moving average of the network (simclr_jax/memory.py). The
paper's figures are with it. Without it, by `--config.memory.size=0`, linear evaluation of ResNet-50 gives
71.1 % instead of 71.7 % (the authors, in the official repository's issue 77), and a step costs a forward pass
less. `--config.use_average=True` takes the average to the other tasks: of RUN, or of a published network that
has one. A smaller network takes `--config.model.depth=50 --config.model.width=1 --config.model.sk_ratio=0`,
and in fine-tuning `--config.optimizer.learning_rate=0.005` besides. knn, transfer and embed are as in
imagenet.py.
"""

from configs import base, imagenet


def pretrain():
    config = imagenet.pretrain()
    config.batch_size = 4096
    config.num_epochs = 800.0
    config.warmup_epochs = 40.0
    config.memory.size = 65536
    config.model.depth = 152
    config.model.width = 3.0
    config.model.sk_ratio = 0.0625
    config.model.projection_layers = 3
    config.optimizer.learning_rate = 0.1
    config.optimizer.scaling = "sqrt"
    config.optimizer.weight_decay = 1e-4
    return config


def linear_eval():
    config = base.linear_eval(pretrain())
    config.optimizer.weight_decay = 1e-6
    return config


def finetune():
    config = base.finetune(pretrain())
    config.batch_size = 1024
    config.num_epochs = 30.0
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.002  # 0.005 for networks neither wide nor with selective kernels
    config.optimizer.scaling = "sqrt"
    return config


def finetune_1pct():
    config = finetune_10pct()
    config.num_epochs = 60.0
    config.dataset.name = "imagenet2012_subset/1pct"
    config.dataset.in_memory = True
    return config


def finetune_10pct():
    config = finetune()
    config.model.supervised_layer = 1
    config.dataset.name = "imagenet2012_subset/10pct"
    return config


def distill():
    config = base.distill(pretrain())
    config.model.depth = 50
    config.model.width = 1.0
    config.model.sk_ratio = 0.0
    return config


def get_config(task=None):
    config = base.task_config(task, pretrain, linear_eval, finetune, finetune_1pct, finetune_10pct, distill)
    if config.task in ("knn", "transfer", "embed", "predict"):  # forward only
        config.batch_size = 1024
    return config

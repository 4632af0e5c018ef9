"""The keys that all datasets share, with their defaults: the paper's where it gives one.

Every key can be set on the command line, as in `--config.batch_size=512`. Nothing else is read, and an
unknown key is an error.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# What other tasks keep of a pretraining config.
_MODEL = ("pretrained", "seed", "batch_size", "image_size", "dataset", "model", "keep_compiled")
_TRAINING = ("num_epochs", "num_steps", "warmup_epochs", "augment", "log_every_steps")
_TRAINING += ("checkpoint_every_steps", "keep_checkpoints", "profile_steps", "tracker")


def pretrain() -> ConfigDict:
    """SimCLR's pretraining (arXiv 2002.05709)."""
    return ConfigDict(
        {
            "task": "pretrain",  # a module of simclr_jax/tasks/
            "pretrained": placeholder(str),  # workdir, checkpoint or file of weights to start from
            "seed": 0,  # of the initialisation, the order of the examples and the augmentations
            "batch_size": 4096,  # images, over all devices of all hosts
            "num_epochs": 100.0,  # passes over the training images
            "num_steps": placeholder(int),  # wins over num_epochs; --config.num_epochs alone unsets it
            "warmup_epochs": 10.0,  # in which the learning rate rises from 0; then it falls as a cosine
            "image_size": 224,  # pixels, after cropping
            "loss": "nt_xent",  # of the projections; see docs/extending.md for one of your own
            "temperature": 0.1,  # of the loss: NT-Xent's
            # For batches beyond the memory: so many parts go through the network one by one, and once more to
            # backpropagate. The loss is that of the whole batch; batch norm takes its statistics over a part.
            "microbatches": 1,
            "remat": False,  # keeps no activations inside residual blocks: less memory, a third more FLOPs
            "dataset": {
                "name": "",  # 'digits', 'folder', 'arrays' (from Python), or a name of TensorFlow Datasets
                "path": placeholder(str),  # of a folder of images
                "classes": True,  # whether sub-folders of that folder are classes, or it has no labels
                "labels": placeholder(str),  # CSV file of labels of that folder; wins over its sub-folders
                "split_seed": placeholder(int),  # of the images of a folder that are held out; None: seed
                "max_pixels": 178_956_970,  # of an image of a folder: larger ones are refused by their header
                # Of 16 bits, what becomes black and white, as (0, 4095); None: told from the folder.
                "value_range": placeholder(tuple),
                "data_dir": placeholder(str),  # of TensorFlow Datasets; gs:// too
                "train_split": "train",  # as TensorFlow Datasets calls it
                "eval_split": "test",  # held-out images
                "probe_split": placeholder(str),  # labelled split to judge features on; None: train_split
                "validation_split": placeholder(str),  # of transfer; None: a fifth of train_split
                "num_examples": placeholder(int),  # of train_split, where the dataset does not tell
                "num_classes": placeholder(int),  # likewise: how many classes
                "in_memory": True,  # holds undecoded images in memory, or streams them
                "shuffle_buffer": 16384,  # undecoded images, over all hosts, when streaming
            },
            "augment": {
                "min_area": 0.08,  # smallest share of the image that a crop may cover
                "flip": True,  # half of the views, from left to right
                "color_jitter_strength": 1.0,  # 0.5 for small images in the paper
                "blur": True,  # half of the views
                # What follows a crop in the train step, on the accelerator: the host needs half of its time.
                "on_device": False,
                "crop_dtype": "float16",  # of what the host hands over then; 'float32': the very same pixels
            },
            "model": {
                "encoder": "resnet",  # see docs/extending.md for one of your own
                "depth": 50,  # layers of the ResNet: 8, 10, 18, 34, 50, 101, 152, 200
                "width": 1.0,  # multiplies every layer's width
                "sk_ratio": 0.0,  # selective kernels: 0.0625 in SimCLR v2
                "se_ratio": 0.0,  # squeeze and excitation
                "stem": "auto",  # 'cifar' up to 32 pixels, else 'imagenet'
                "max_pool": "tensorflow",  # how it pads; 'torch': on all sides, as PyTorch's does
                "project_first": True,  # a convolution on the first shortcut of ResNet-18 and 34, too
                "bottleneck_width": 1.0,  # multiplies the width inside bottlenecks: 2 in Wide ResNet-50-2
                # Of networks that others trained, which bring theirs along, as (0.485, 0.456, 0.406):
                "input_mean": placeholder(tuple),  # subtracted from colours in [0, 1]; None: nothing
                "input_std": placeholder(tuple),  # what they are divided by then
                "projection_layers": 2,  # 0: none, 1: linear; 3 in SimCLR v2
                "projection_dim": 128,  # of what NT-Xent compares
                "supervised_layer": 0,  # projection layer that the linear classifier reads; 0: the features
                "zero_init_logits": False,  # the classifier starts at zero
                "sync_batch_norm": True,  # statistics of the global batch
                "dtype": "auto",  # of activations: bfloat16 on TPU and GPU, float32 on CPU
            },
            "optimizer": {
                "name": "lars",  # or 'sgd', 'adam'
                "learning_rate": 0.3,  # before scaling with the batch size
                "scaling": "linear",  # times batch_size / 256; 'sqrt': times its square root
                "weight_decay": 1e-6,  # of weights: LARS leaves biases, batch norm and classifier out
                "momentum": 0.9,
            },
            "labels_per_class": 5,  # in the few-label score
            "evaluate": {
                "every_epochs": 10.0,  # k-nearest-neighbour accuracy, where there are labels
                "max_examples": 50_000,  # training and held-out images that it uses, each
                # At the end, linear and few-label accuracy, also of the untrained encoder and of raw pixels:
                # beside the passes through the network at most 15 minutes of 2 CPU cores and 5 GB, whatever
                # the number and the size of the images (up to 100 classes; see simclr_jax/evaluation/).
                "compare": True,
                "pictures": True,  # TensorBoard gets some views, and a map of held-out images at the end
            },
            "log_every_steps": 50,  # averages go to the console and to the metric files
            "checkpoint_every_steps": 1000,  # what a crash costs at most
            "keep_checkpoints": 3,  # newest ones; the best by k-nearest neighbours stays as well
            "keep_compiled": True,  # the command's programs, in WORKDIR/compiled, for runs that go on
            "profile_steps": placeholder(tuple),  # the first and the last step to trace, as (10, 12)
            "tracker": "",  # 'wandb' or 'mlflow' get config, metrics and summary, too
        }
    )


def linear_eval(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of linear evaluation (v1 appendix B.6)."""
    config = _supervised(config, "linear_eval", learning_rate=0.1)
    config.num_epochs = 90.0
    config.model.zero_init_logits = True
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of fine-tuning (v1 appendix B.5)."""
    config = _supervised(config, "finetune", learning_rate=0.05)
    config.num_epochs = 60.0
    config.model.zero_init_logits = True
    config.fine_tune_after_block = -1  # 0 freezes the stem, 1 the first block group too, ...; -1 nothing
    config.labels_per_class = placeholder(int)  # None: all labels
    config.draws = 1  # of those labels: every draw is a run of its own
    config.evaluate.compare = False  # with the same network from scratch
    config.evaluate.scratch_learning_rate = placeholder(float)  # its own; None: optimizer.learning_rate
    return config


def distill(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of distillation; `config.model` is the student (v2 section 2).

    Optimiser, learning rate and batch size stay those of pretraining (v2 section 3).
    """
    optimizer = config.optimizer
    config = _supervised(config, "distill", learning_rate=0.1)
    config.optimizer = optimizer
    config.num_epochs = 400.0
    config.warmup_epochs = 20.0
    config.temperature = 1.0  # 0.1 in self-distillation
    config.label_weight = 0.0  # share of the loss on labels: 1 - alpha of the paper's equation 3
    config.evaluate.compare = False  # with the same network on the labels alone
    return config


def knn(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of the k-nearest-neighbour classifier (Wu et al. 2018)."""
    config = _keep(config, "knn", *_MODEL)
    config.k = 200  # neighbours that vote
    config.temperature = 0.07  # a neighbour's vote weighs exp(cosine / temperature)
    return config


def transfer(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of logistic regression on features (v1 appendix B.8.1)."""
    config = _keep(config, "transfer", *_MODEL)
    config.metric = "top1"  # chooses the L2 weight; 'mean_per_class': Aircraft, Pets, Caltech-101, Flowers
    return config


def embed(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of writing features to files."""
    config = _keep(config, "embed", *_MODEL)
    config.dataset.in_memory = False
    config.splits = placeholder(str)  # as train+eval; None: that, or all images of a folder
    config.examples_per_part = 10_000  # held in memory, and lost by a crash, at most
    return config


def predict(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of writing what a trained classifier says of every image."""
    config = _keep(config, "predict", *_MODEL)
    config.dataset.in_memory = False
    config.splits = placeholder(str)  # as train+eval; None: that, or all images of a folder
    config.examples_per_part = 10_000  # held in memory, and lost by a crash, at most
    return config


def _supervised(config, task, *, learning_rate):
    """The keys of tasks that train on single images."""
    config = _keep(config, task, *_MODEL, *_TRAINING)
    for key in ("color_jitter_strength", "blur", "on_device", "crop_dtype"):
        del config.augment[key]
    config.warmup_epochs = 0.0
    config.optimizer = ConfigDict(
        {
            "name": "sgd",  # with Nesterov momentum
            "learning_rate": learning_rate,  # before scaling with the batch size
            "scaling": "linear",
            "weight_decay": 0.0,
            "momentum": 0.9,
        }
    )
    config.evaluate = ConfigDict({"every_epochs": 10.0})  # accuracy on held-out images
    return config


def _keep(config, task, *keys):
    for key in set(config) - set(keys):
        del config[key]
    config.task = task
    return config


def task_config(task: str | None, *tasks) -> ConfigDict:
    """The config of one of a file's tasks: functions named after them, of which the first is the default."""
    named = {function.__name__: function for function in tasks}
    name = task or tasks[0].__name__
    if name not in named:
        raise ValueError(f"task '{name}' is unknown: expected one of {', '.join(named)}")
    return named[name]()

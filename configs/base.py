"""The keys that all datasets share, with their defaults: the paper's where it gives one.

Every key can be set on the command line, as in `--config.batch_size=512`. Nothing else is read, and an
unknown key is an error. `--help` prints the comment beside a key as its meaning. A number needs an entry in
`POSITIVE` or `RANGES`.

Every function here whose one parameter is `config` makes the config of the task of its name from that of
pretraining; functions with other parameters are helpers.
"""

import inspect
import math
from collections.abc import Callable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Keys that other tasks keep of a pretraining config.
_MODEL = ("pretrained", "use_average", "seed", "batch_size", "image_size", "dataset", "model")
_MODEL += ("keep_compiled",)
_TRAINING = ("num_epochs", "num_steps", "warmup_epochs", "augment", "log_every_steps")
_TRAINING += ("checkpoint_every_steps", "keep_checkpoints", "profile_steps", "tracker")

# The numbers above 0. None is allowed, here and below, where it is the default of a key.
POSITIVE = (
    "batch_size",
    "num_epochs",
    "num_steps",
    "image_size",
    "temperature",
    "microbatches",
    "labels_per_class",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "dataset.max_pixels",
    "dataset.channels",
    "dataset.tile",
    "dataset.num_examples",
    "dataset.num_classes",
    "dataset.shuffle_buffer",
    "augment.min_area",
    "model.channels",
    "model.depth",
    "model.projection_dim",
    "optimizer.learning_rate",
    "evaluate.every_epochs",
    "evaluate.max_examples",
    "evaluate.scratch_learning_rate",
    "draws",
    "k",
    "examples_per_part",
)

# The smallest and the largest value of other numbers, and of those above 0 that have a largest value.
RANGES = {
    "seed": (0, 2_000_000_000),  # draws of labels count on from a seed, within 32 bits
    "warmup_epochs": (0, math.inf),
    "dataset.split_seed": (0, 2_000_000_000),
    "dataset.tile_overlap": (0, math.inf),
    "augment.min_area": (0, 1),
    "augment.color_jitter_strength": (0, 1.25),
    "augment.brightness": (0, 1),
    "augment.contrast": (0, 1),
    "augment.saturation": (0, 1),
    "augment.hue": (0, 0.5),
    "augment.grayscale": (0, 1),
    "augment.solarize": (0, 1),
    "augment.drop_channel": (0, 1),
    "augment.noise": (0, 1),
    "model.width": (1 / 32, 64),  # 2 to 4,096 filters in the first block group
    "memory.size": (0, 2**24),
    "memory.decay": (0, 1),
    "model.sk_ratio": (0, 1),
    "model.se_ratio": (0, 1),
    "model.bottleneck_width": (1 / 32, 64),
    "model.projection_layers": (0, 100),
    "model.supervised_layer": (0, 100),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.momentum": (0, 0.9999),
    "fine_tune_after_block": (-1, 4),
    "label_weight": (0, 1),
    "at_least": (0, 1),
}

# The words that a key may be.
CHOICES = {
    "augment.crop_dtype": ("float16", "float32"),
    "augment.dtype": ("uint8", "float16"),
    "model.stem": ("auto", "cifar", "imagenet"),
    "model.max_pool": ("tensorflow", "torch"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "optimizer.scaling": ("linear", "sqrt"),
    "tracker": ("", "wandb", "mlflow"),
    "metric": ("top1", "mean_per_class"),
}


def pretrain() -> ConfigDict:
    """SimCLR's pretraining (arXiv 2002.05709)."""
    return ConfigDict(
        {
            "task": "pretrain",  # a module of simclr_jax/tasks/
            "pretrained": placeholder(str),  # workdir, checkpoint or file of weights to start from
            "use_average": False,  # starts from the moving average of its weights; see memory.size
            "seed": 0,  # decides the initial weights, the order of the examples and the augmentations
            "batch_size": 4096,  # images, over all devices of all hosts
            "num_epochs": 100.0,  # passes over the training images
            "num_steps": placeholder(int),  # wins over num_epochs; --config.num_epochs alone unsets it
            "warmup_epochs": 10.0,  # epochs of a rising learning rate; then it falls as a cosine
            "image_size": 224,  # height and width of the views, in pixels
            "loss": "nt_xent",  # name in losses.LOSSES, as 'dcl'; docs/extending.md adds one of your own
            "temperature": 0.1,  # divides the similarities in the loss
            "memory": {
                # Projections of earlier batches, by a moving average of the network, that are negatives, too
                # (SimCLR v2, section 2); 0: none.
                "size": 0,
                "decay": 0.999,  # share of that average that a step keeps
            },
            # Parts of a batch that go through the network one by one, and once more to backpropagate, where
            # the memory does not hold a whole batch. The loss compares the whole batch; batch norm takes its
            # statistics over a part.
            "microbatches": 1,
            "remat": False,  # keeps no activations inside residual blocks: less memory, a third more FLOPs
            "dataset": {
                "name": "",  # 'digits', 'folder', 'arrays' (from Python), or a name of TensorFlow Datasets
                "path": placeholder(str),  # folder of images
                "classes": True,  # whether the folder's sub-folders are classes; False: it has no labels
                "labels": placeholder(str),  # CSV file of labels of its images; wins over its sub-folders
                # Takes `a;b` in that file as two labels, and `;` as none of the classes; or, without a column
                # label, every column but name as a class, with 1 or 0.
                "several_labels": False,
                # Keeps images of one group, as a patient, on one side: a level of sub-folders, as 1, or a
                # column of the CSV file.
                "group": placeholder(str),
                "split_seed": placeholder(int),  # decides which images of the folder are held out; None: seed
                "max_pixels": 178_956_970,  # images of the folder with more are refused, by their header
                # Values of images of more than 8 bits that become black and white, as (0, 4095), each a
                # number or one for each channel; None: told from some of them.
                "value_range": placeholder(tuple),
                "channels": placeholder(int),  # takes the first ones of more; None: all, and greys as colours
                # Cuts the images of the folder into tiles of this side, in pixels, each an image of its own;
                # None: images as they are.
                "tile": placeholder(int),
                "tile_overlap": 0,  # pixels that a tile shares with the next one
                "data_dir": placeholder(str),  # folder of TensorFlow Datasets; gs:// too
                "train_split": "train",  # split of TensorFlow Datasets to train on
                "eval_split": "test",  # split of held-out images
                "probe_split": placeholder(str),  # labelled split to judge features with; None: train_split
                # Split that transfer chooses the L2 weight on; None: a fifth of train_split.
                "validation_split": placeholder(str),
                "num_examples": placeholder(int),  # images in train_split, where the dataset does not tell
                "num_classes": placeholder(int),  # classes, where the dataset does not tell
                "in_memory": True,  # holds undecoded images in memory; False: reads them from disk
                "shuffle_buffer": 16384,  # undecoded images, over all hosts; not of ArrayRecord files
                # Holds decoded images of one size on every device, where the views are made; None: on GPUs
                # and TPUs, of images of at most twice the views' side that take a tenth of the memory.
                "on_device": placeholder(bool),
            },
            "augment": {
                "min_area": 0.08,  # smallest share of the image that a crop may cover
                "flip": True,  # mirrors half of the views, from left to right
                "vertical_flip": False,  # mirrors half of the views from top to bottom, too
                "rotate": False,  # turns views by 0 to 3 quarters of the circle
                "color_jitter_strength": 1.0,  # how far colours change; 0.5 for small images in the paper
                # Where there are other than 3 channels, brightness and contrast change each channel by
                # itself.
                "brightness": placeholder(float),  # factors within 1 +- this; None: 0.8 times the strength
                "contrast": placeholder(float),  # likewise
                "saturation": placeholder(float),  # likewise
                "hue": placeholder(float),  # turns by this share of the circle; None: 0.2 times the strength
                "grayscale": 0.2,  # probability that a view becomes grey
                "blur": True,  # blurs half of the views
                "solarize": 0.0,  # probability that a view is solarised (BYOL, arXiv 2006.07733, appendix B)
                "drop_channel": 0.0,  # probability that a channel of a view becomes black
                "noise": 0.0,  # largest deviation of the noise of a sensor, Poisson and Gaussian, at white
                "dtype": "uint8",  # type of views; told from the images: 'float16' of more than 8 bits
                # Distorts the crops in the train step, on the accelerator: the host needs half of its time.
                # dataset.on_device does it anyway.
                "on_device": False,
                "crop_dtype": "float16",  # type of crops on their way there; 'float32': the very same pixels
            },
            "model": {
                "encoder": "resnet",  # name in models.ENCODERS; docs/extending.md adds one of your own
                "channels": 3,  # of the images, from which it is told
                "depth": 50,  # layers of the ResNet: 8, 10, 18, 34, 50, 101, 152, 200
                "width": 1.0,  # multiplies every layer's width
                "sk_ratio": 0.0,  # selective kernels: 0.0625 in SimCLR v2; 0: none
                "se_ratio": 0.0,  # squeeze and excitation: reduced width over width; 0: none
                "stem": "auto",  # first layers: 'cifar', 'imagenet'; 'auto': 'cifar' up to 32 pixels
                "max_pool": "tensorflow",  # padding; 'torch': on all sides, as PyTorch pads
                "project_first": True,  # puts a convolution on the first shortcut of ResNet-18 and 34, too
                "bottleneck_width": 1.0,  # multiplies the width inside bottlenecks: 2 in Wide ResNet-50-2
                # Mean of colours in [0, 1] that is subtracted, as (0.485, 0.456, 0.406); None: nothing is.
                # Networks that others trained bring theirs along.
                "input_mean": placeholder(tuple),
                "input_std": placeholder(tuple),  # divides the colours after that; None: nothing does
                "projection_layers": 2,  # layers of the projection head: 0: none, 1: linear; 3 in SimCLR v2
                "projection_dim": 128,  # width of the projections that the loss compares
                "supervised_layer": 0,  # projection layer that the linear classifier reads; 0: the features
                "zero_init_logits": False,  # the classifier starts at zero
                "sync_batch_norm": True,  # takes batch norm's statistics over all devices
                "dtype": "auto",  # type of activations; 'auto': bfloat16 on TPU and GPU, float32 on CPU
            },
            "optimizer": {
                "name": "lars",  # or 'sgd', 'adam'
                "learning_rate": 0.3,  # before scaling with the batch size
                "scaling": "linear",  # times batch_size / 256; 'sqrt': times its square root
                "weight_decay": 1e-6,  # LARS leaves biases, batch norm and classifier out
                "momentum": 0.9,  # momentum of lars and sgd; the first decay rate of adam
            },
            "labels_per_class": 5,  # labelled images of each class in the few-label score
            "evaluate": {
                # epochs between measurements of health and, with labels, of nearest neighbours
                "every_epochs": 10.0,
                "max_examples": 50_000,  # training images, and as many held-out ones, that scores use at most
                # Measures linear and few-label accuracy at the end, and that of the untrained encoder and raw
                # pixels. Beside passes through the network, this takes at most 15 minutes of 2 CPU cores
                # and 5 GB, whatever the number and size of the images (up to 100 classes; see
                # simclr_jax/evaluation/).
                "compare": True,
                "pictures": True,  # gives TensorBoard some views, and a map of held-out images at the end
            },
            "log_every_steps": 50,  # steps between lines of averages on the console and in the metric files
            "checkpoint_every_steps": 1000,  # steps that a crash costs at most
            "keep_checkpoints": 3,  # newest checkpoints to keep; the best by nearest neighbours stays as well
            # Keeps compiled programs for later runs: in ~/.cache/simclr_jax, for gs:// in WORKDIR/compiled.
            "keep_compiled": True,
            "profile_steps": placeholder(tuple),  # the first and the last step to trace, as (10, 12)
            "tracker": "",  # 'wandb' or 'mlflow' gets config, metrics and summary, too
        }
    )


def linear_eval(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of linear evaluation (v1 appendix B.6)."""
    config = _supervised(config, "linear_eval", learning_rate=0.1)
    config.num_epochs = 90.0
    # Weights of the classes in the loss: 'balanced', by the inverse of their numbers, or a CSV file of
    # class,weight; None: all images weigh alike.
    config.class_weights = placeholder(str)
    # Draws every class equally often, images of small classes repeatedly; the number of steps stays.
    config.balanced_draws = False
    config.model.zero_init_logits = True
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of fine-tuning (v1 appendix B.5)."""
    config = _supervised(config, "finetune", learning_rate=0.05)
    config.num_epochs = 60.0
    # Weights of the classes in the loss: 'balanced', by the inverse of their numbers, or a CSV file of
    # class,weight; None: all images weigh alike.
    config.class_weights = placeholder(str)
    # Draws every class equally often, images of small classes repeatedly; the number of steps stays.
    config.balanced_draws = False
    config.model.zero_init_logits = True
    config.fine_tune_after_block = -1  # 0 freezes the stem, 1 the first block group too; -1: nothing
    config.labels_per_class = placeholder(int)  # None: all labels
    config.draws = 1  # random choices of those labels; every draw is a run of its own
    config.evaluate.compare = False  # trains the same network from scratch as well
    # Learning rate of the network from scratch; None: optimizer.learning_rate.
    config.evaluate.scratch_learning_rate = placeholder(float)
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
    config.embeddings = placeholder(str)  # .parquet or .npz of names and vectors, which teach, not pretrained
    config.temperature = 1.0  # divides the logits of teacher and student; 0.1 in self-distillation
    config.label_weight = 0.0  # share of the loss on labels: 1 - alpha of the paper's equation 3
    config.evaluate.compare = False  # trains the same network on the labels alone as well
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
    # Weights of the classes in the loss: 'balanced', by the inverse of their numbers, or a CSV file of
    # class,weight; None: all images weigh alike.
    config.class_weights = placeholder(str)
    config.metric = "top1"  # chooses the L2 weight; 'mean_per_class' for Aircraft, Pets, Caltech-101, Flowers
    return config


def embed(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of writing features to files."""
    config = _keep(config, "embed", *_MODEL)
    config.dataset.in_memory = False
    config.splits = placeholder(str)  # splits, as train+eval; None: these two, or all images of a folder
    config.examples_per_part = 10_000  # images in memory, and lost by a crash, at most
    config.beam = placeholder(str)  # flags of Apache Beam, whose workers make parts, as --runner=DirectRunner
    return config


def predict(config: ConfigDict) -> ConfigDict:
    """Turns a pretraining config into that of writing a trained classifier's predictions for every image."""
    config = _keep(config, "predict", *_MODEL)
    config.at_least = 0.0  # leaves the label empty where its calibrated probability is lower
    config.dataset.in_memory = False
    config.splits = placeholder(str)  # splits, as train+eval; None: these two, or all images of a folder
    config.examples_per_part = 10_000  # images in memory, and lost by a crash, at most
    config.beam = placeholder(str)  # flags of Apache Beam, whose workers make parts, as --runner=DirectRunner
    return config


def _supervised(config, task, *, learning_rate):
    """Keeps the keys of tasks that train on single images."""
    config = _keep(config, task, *_MODEL, *_TRAINING)
    for key in set(config.augment) - {"min_area", "flip", "vertical_flip", "rotate"}:
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
    config.evaluate = ConfigDict({"every_epochs": 10.0})  # epochs between scores on held-out images
    return config


def _keep(config, task, *keys):
    for key in set(config) - set(keys):
        del config[key]
    if "on_device" in config.dataset:
        del config.dataset.on_device
    config.task = task
    return config


def task_config(task: str | None, *functions) -> ConfigDict:
    """Returns the config of one of the tasks of a config file.

    Args:
      task: its name; None for that of the first function.
      functions: the tasks that the file defines, each named after its task. Where `pretrain` is among them,
        the file has the tasks above, too: each as its function above makes it from that `pretrain`.

    Raises:
      ValueError: the file has no such task.
    """
    own = {function.__name__: function for function in functions}
    name = task or functions[0].__name__
    if name in own:
        return own[name]()
    shared = tasks() if "pretrain" in own else {}
    if name not in shared:
        names = ", ".join(dict.fromkeys([*own, *shared]))
        raise ValueError(f"task '{name}' is unknown: expected one of {names}")
    return shared[name](own["pretrain"]())


def tasks() -> dict[str, Callable[[ConfigDict], ConfigDict]]:
    """The functions above that make a task's config from that of pretraining, by name."""
    functions = [value for value in globals().values() if inspect.isfunction(value)]
    return {
        function.__name__: function
        for function in functions
        if function.__module__ == __name__ and list(inspect.signature(function).parameters) == ["config"]
    }

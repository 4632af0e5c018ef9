"""The keys that all datasets share, with their defaults: the paper's where it gives one.

Every key can be set on the command line, as in `--config.batch_size=512`. Nothing else is read, and an
unknown key is an error.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def pretrain() -> ConfigDict:
    """SimCLR's pretraining (arXiv 2002.05709)."""
    return ConfigDict(
        {
            "task": "pretrain",
            "seed": 0,  # of the initialisation, the order of the examples and the augmentations
            "batch_size": 4096,  # images, over all devices of all hosts
            "num_epochs": 100.0,
            "num_steps": placeholder(int),  # wins over num_epochs where it is set
            "warmup_epochs": 10.0,
            "image_size": 224,  # pixels, after cropping
            "temperature": 0.1,  # of NT-Xent
            "dataset": {
                "name": "",  # 'digits', 'folder', or a name of TensorFlow Datasets
                "path": placeholder(str),  # of a folder of images
                "data_dir": placeholder(str),  # of TensorFlow Datasets; gs:// too
                "train_split": "train",
                "eval_split": "test",
                "probe_split": placeholder(str),  # labelled split to judge features on; None: train_split
                "num_examples": placeholder(int),  # of train_split, where the dataset does not tell
                "num_classes": placeholder(int),  # likewise
                "in_memory": True,  # holds undecoded images in memory, or streams them
                "shuffle_buffer": 16384,  # undecoded images, over all hosts, when streaming
            },
            "augment": {
                "min_area": 0.08,  # smallest share of the image that a crop may cover
                "flip": True,
                "color_jitter_strength": 1.0,  # 0.5 for small images in the paper
                "blur": True,
            },
            "model": {
                "depth": 50,
                "width": 1.0,  # multiplies every layer's width
                "sk_ratio": 0.0,  # selective kernels: 0.0625 in SimCLR v2
                "se_ratio": 0.0,  # squeeze and excitation
                "stem": "auto",  # 'cifar' up to 32 pixels, else 'imagenet'
                "projection_layers": 2,  # 0: none, 1: linear; 3 in SimCLR v2
                "projection_dim": 128,
                "supervised_layer": 0,  # projection layer that the linear classifier reads; 0: the features
                "zero_init_logits": False,
                "sync_batch_norm": True,  # statistics of the global batch
                "dtype": "auto",  # of activations: bfloat16 on TPU and GPU, float32 on CPU
            },
            "optimizer": {
                "name": "lars",
                "learning_rate": 0.3,  # before scaling with the batch size
                "scaling": "linear",  # times batch_size / 256; 'sqrt': times its square root
                "weight_decay": 1e-6,
                "momentum": 0.9,
            },
            "labels_per_class": 5,  # in the few-label score
            "evaluate": {
                "every_epochs": 10.0,  # k-nearest-neighbour accuracy, where there are labels
                "max_examples": 50_000,  # training and held-out images that it uses, each
                # At the end, linear and few-label accuracy, also of the untrained encoder and of raw pixels.
                "compare": True,
            },
            "log_every_steps": 50,
            "checkpoint_every_steps": 1000,
            "keep_checkpoints": 3,  # newest ones; the best by k-nearest neighbours stays as well
        }
    )


def task_config(tasks: dict, task: str | None) -> ConfigDict:
    """The config of one of a file's tasks; the first is the default."""
    name = task or next(iter(tasks))
    if name not in tasks:
        raise ValueError(f"task '{name}' is unknown: expected one of {', '.join(tasks)}")
    return tasks[name]()

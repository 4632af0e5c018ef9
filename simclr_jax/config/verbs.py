"""The verbs of `simclr-jax`: another module's command, or a task that takes from a run what the run knows."""

import os
import runpy
import subprocess
import sys

from simclr_jax.config import saved, settings, shipped
from simclr_jax.process import UserError, errors, escape, files
from simclr_jax.workdir import records

HELP = """\
usage: simclr-jax VERB ... [--config.KEY=VALUE ...]

from a folder of images to predictions:
  pretrain PHOTOS --workdir=RUN       learns from images without labels; or as a config says: pretrain digits
  look RUN                            its page: what was learnt, what to label, predictions to correct
  finetune RUN --labels=labels.csv    a classifier from these labels, in RUN/classifier
  predict RUN/classifier NEW          its predictions for a folder, in RUN/classifier/predicted
  round RUN --labels=labels.csv       from more labels: classifier, predictions of RUN's images, page
  look RUN --serve                    the page saves labels by itself, and runs round by a button

more of a run:
  linear_eval, knn, transfer, distill, embed RUN      classifiers and features, in RUN/VERB
  suggest RUN [--labelled=labels.csv]                 a CSV file of the images to label next
  nearest RUN                                         the images most similar to others
  export RUN                                          its network in other formats
  status RUN                                          how far it is

before a run:
  check, plan, benchmark                              what it needs, and whether it would be refused
  prepare PHOTOS --name=NAME --data_dir=DIR           writes many or large images as one dataset, once

VERB --help tells more; so does simclr-jax --config=FILE:TASK --help, with every key."""
MODULES = {
    "look": "simclr_jax.plots",
    "suggest": "simclr_jax.evaluation.suggest",
    "nearest": "simclr_jax.evaluation.neighbours",
    "export": "simclr_jax.export",
    "status": "simclr_jax.workdir.status",
    "check": "simclr_jax.check",
    "plan": "simclr_jax.plan",
    "benchmark": "simclr_jax.benchmark",
    "prepare": "simclr_jax.data.prepare",
}
FOLDERS = {"finetune": "classifier", "predict": "predicted"}  # of a run, for tasks not called as their folder
_OWN = ("on_device", "in_memory", "shuffle_buffer")  # Keys of `dataset` that say how one run reads it.


def flags_of(verb: str, words: list[str]) -> list[str]:
    """Returns the flags of `simclr_jax.main` that a verb for a task, and its words, stand for.

    Args:
      verb: the name of a task.
      words: a run, or with 'pretrain' a folder of images or a config; with 'predict' and 'embed' another
        folder of images; flags, which win.

    Raises:
      UserError: a word is missing, or one too many; there is no run.
    """
    places, flags = _split(words)
    flags = [_long(flag) for flag in flags]
    if not places and "--help" in flags:
        return [f"--config=configs/folder.py:{verb}", *flags]
    if not places:
        wanted = "a folder of images, or a config, as in simclr-jax pretrain digits"
        wanted = wanted if verb == "pretrain" else f"the workdir of a run, as in simclr-jax {verb} RUN"
        raise UserError(f"{verb}: give {wanted}; simclr-jax --help has examples")
    if len(places) > 1 + (verb in ("predict", "embed")):
        raise UserError(f"{verb}: {escape(places[-1])!r} is one word too many: write flags as --NAME=VALUE")
    own = _pretrain(*places) if verb == "pretrain" else _of_run(verb, *places, flags=flags)
    names = {flag.partition("=")[0] for flag in flags}
    return [flag for flag in own if flag.partition("=")[0] not in names] + flags


def _split(words):
    """Returns the places among the words of a verb, and its flags."""
    return [[word for word in words if word.startswith("-") == is_flag] for is_flag in (False, True)]


def _long(flag):
    name, equals, value = flag.partition("=")
    short = {"--labels": "--config.dataset.labels", "--path": "--config.dataset.path"}
    return short.get(name, name) + equals + value


def _pretrain(place):
    if place in shipped.files():
        return [f"--config=configs/{place}.py"]
    if place.partition(":")[0].endswith(".py"):
        return [f"--config={place}"]
    name = os.path.basename(os.path.abspath(place))
    return ["--config=configs/folder.py", f"--config.dataset.path={place}", f"--workdir=runs/{name}"]


def _of_run(verb, run, folder=None, *, flags):
    """The flags of a task that starts from a run, of its images or of those in another folder."""
    config = saved.complete(records.read_config(run))
    dataset = {"name": "folder", "path": folder} if folder else dict(config["dataset"])
    file = _file(dataset["name"])
    defaults = settings.defaults(f"{file}:{verb}").dataset.to_dict()
    if verb == "predict" and files.holds_predictions(dataset.get("labels") or ""):
        dataset["labels"] = None  # Predictions are no truth to measure others by.
    values = {
        f"--config.dataset.{key}": tuple(value) if isinstance(value, list) else value
        for key, value in dataset.items()
        if key in defaults and key not in _OWN and value != defaults[key]
    }
    own = [f"--config={file}:{verb}", f"--config.pretrained={run}"]
    own.append(f"--workdir={run.rstrip('/')}/{FOLDERS.get(verb, verb)}")
    return own + [f"{name}={value}" for name, value in values.items()]


def _file(dataset):
    """The config file for a dataset; that of ImageNet, with the paper's settings, for unknown ones."""
    names = {settings.defaults(f"configs/{name}.py").dataset.name: name for name in [*shipped.files()][::-1]}
    return f"configs/{names.get(dataset, 'imagenet')}.py"


def run_round(words: list[str]) -> int:
    """Trains a classifier in the next folder RUN/round-N, predicts RUN's own images, and makes its page.

    Returns:
      The exit code of what failed, or 0.

    Raises:
      UserError: there is no run, or no file of labels.
    """
    places, flags = _split(words)
    if len(places) != 1 or not any(flag.startswith("--labels=") for flag in flags):
        raise UserError("round: give a run and its labels, as in simclr-jax round RUN --labels=labels.csv")
    run = places[0].rstrip("/")
    records.read_config(run)
    number = 1
    while files.exists(f"{run}/round-{number}"):
        number += 1
    classifier = f"{run}/round-{number}"
    for verb in (
        ["finetune", run, *flags, f"--workdir={classifier}"],
        ["predict", classifier],
        ["look", run],
    ):
        code = subprocess.run([sys.executable, "-m", "simclr_jax", *verb]).returncode
        if code:
            return code
    return 0


def main(words: list[str]) -> None:
    """Runs a verb and its words, or the flags of `simclr_jax.main`."""
    if not words or words[0] in ("--help", "-h", "help") or words == ["round", "--help"]:
        print(HELP)
        return
    verb = words[0]
    with errors.one_line_errors():
        if verb == "round":
            sys.exit(run_round(words[1:]))
        if verb in MODULES:
            del sys.argv[1]
            runpy.run_module(MODULES[verb], run_name="__main__", alter_sys=True)
            return
        if verb in shipped.tasks():
            sys.argv = [sys.argv[0], *flags_of(verb, words[1:])]
        elif not verb.startswith("-"):
            known = ", ".join([*shipped.tasks(), "round", *MODULES])
            raise UserError(
                f"{escape(verb)!r} is no verb: choose one of {known}; simclr-jax --help tells more"
            )
    from simclr_jax import main

    sys.modules["__main__"].__doc__ = main.__doc__  # --help shows it
    main.run()

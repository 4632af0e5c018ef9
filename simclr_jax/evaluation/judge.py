"""Scores of the features of pretraining: their health, and their accuracy beside that of two baselines.

The baselines are the same network with random weights, and the pixels themselves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from simclr_jax.evaluation import features, health, probes, similarity
from simclr_jax.evaluation.held_out import labelled_by_csv
from simclr_jax.process import UserError
from simclr_jax.workdir import report

SPACES = ("features", "projection")
# Images whose health is measured; with two views of each, the effective rank is at most twice this number.
HEALTH_EXAMPLES = 2048
_FEW_IMAGES = 200  # Training images below which a note advises published weights.
_BASELINES = {"untrained": "those of an untrained network", "raw_pixels": "raw pixels"}


class Labelled(NamedTuple):
    """Labelled examples: those that probes learn from, and the held-out ones.

    `held_out` is None where the labels are too few to hold some out: then scores are cross-validated.
    """

    train: Any
    held_out: Any | None


class Scores(NamedTuple):
    """Top-1 accuracies of the probes, as fractions; for few labels, mean and deviation over the draws."""

    knn_accuracy: float
    linear_accuracy: float
    few_label_accuracy: float
    few_label_deviation: float


class Judge:
    """Measures the features of a network in the course of its pretraining, and of its baselines in the end.

    Attributes:
      labelled: the examples that accuracies are measured on; None where there are no labels.
      device_bytes: room for images that evaluations keep on the devices after they have read them once.
    """

    def __init__(self, config, model, source, load: Callable, views: Callable) -> None:
        """Opens the examples.

        Args:
          config: a config of pretraining.
          model: from `make_model`.
          source: the training images.
          load: split -> examples of `config.dataset`.
          views: (image, seed) -> `view1` and `view2`, as a transform of the pipeline.
        """
        from simclr_jax.data import datasets

        self._config, self._views, self._kept, self.device_bytes = config, views, {}, 0
        if source.num_examples < _FEW_IMAGES and not config.pretrained:
            report.say(
                f"note: {source.num_examples} training images are few to learn from: published weights are a "
                "better start, --config.pretrained=FILE (docs/published.md)"
            )
        size = min(HEALTH_EXAMPLES, config.evaluate.max_examples)
        self._health_source = datasets.sample(source, size, seed=config.seed)
        self._encode_views = features.make_map(partial(_encode_views, model))
        self._extract = features.make_extract(model)
        self.labelled = _find_labelled(config, source, load)

    def health(self, variables) -> dict[str, dict[str, float]]:
        """Returns the health of features and projections of training images; see `evaluation.health`."""
        rows = self._encode_views(variables, self._batches(self._health_source, two_views=True))
        return {space: health.measure(rows[f"view1_{space}"], rows[f"view2_{space}"]) for space in SPACES}

    def knn_accuracy(self, variables) -> float:
        """Returns the accuracy of the nearest neighbours of held-out images."""
        return float(self._score(probes.knn_accuracy, self._features(variables)))

    def log(self, variables) -> dict[str, float]:
        """Returns the metrics of a train state for the log: its health, and the neighbours' accuracy."""
        metrics = flatten_dict(self.health(variables), sep="_")
        for space in SPACES:
            del metrics[f"{space}_dimensions"]
        return metrics | ({"knn_accuracy": self.knn_accuracy(variables)} if self.labelled else {})

    def summarize(self, trained, untrained: Any | None) -> dict[str, Any]:
        """Compares the trained features with the baselines.

        Args:
          trained: {'params', 'batch_stats'}.
          untrained: likewise, with random weights; None measures no baselines.

        Returns:
          For the summary: `health`; where there are labels `trained`, and with baselines also `untrained`,
          `raw_pixels` and `few_label_deviation`; `notes` where the trained features are no better.
        """
        baselines = [] if untrained is None else [*_BASELINES] if self.labelled else ["untrained"]
        report.say(f"measuring: {', '.join(['trained', *baselines]).replace('_', ' ')}")
        summary: dict[str, Any] = {"health": self.health(trained)}
        if untrained is not None:
            baseline = self.health(untrained)
            summary["health"] |= {f"untrained_{space}": measures for space, measures in baseline.items()}
        dimensions = summary["health"]["features"]["dimensions"]
        if (images := self._health_source.num_examples) < dimensions:
            report.say(
                f"note: health is that of {images:,} images, fewer than the features' {dimensions:,} "
                "dimensions: their effective rank is limited by the images, too"
            )
        if not self.labelled:
            return summary
        if untrained is None:
            return summary | {"trained": {"knn_accuracy": self.knn_accuracy(trained)}}
        scores = {
            "trained": self._all_scores(self._features(trained), note_copies=True),
            "untrained": self._all_scores(self._features(untrained)),
            "raw_pixels": self._all_scores(self._pixels),
        }
        summary |= {name: score._asdict() for name, score in scores.items()}
        summary["few_label_deviation"] = {name: summary[name].pop("few_label_deviation") for name in scores}
        return summary | ({"notes": sentences} if (sentences := notes(summary)) else {})

    def _features(self, variables):
        return lambda source: self._extract(variables, self._batches(source))

    def _pixels(self, source):
        return features.raw_pixels(self._batches(source))

    def _batches(self, source, two_views=False):
        """Returns the batches of images, or of two views of each, from the devices where they are kept."""
        name, config = (id(source), two_views), self._config
        if name not in self._kept:
            options = {"transform": self._views, "seed": config.seed} if two_views else {}
            batches = features.batches_of(config, source, **options)
            image = config.image_size**2 * source.channels * np.dtype(source.dtype).itemsize
            size = source.num_examples * image * (2 if two_views else 1)
            if size > self.device_bytes:
                return batches
            self._kept[name] = [*map(features.place, batches)]
            self.device_bytes -= size
        return self._kept[name]

    def _all_scores(self, represent, note_copies=False) -> Scores:
        def measure(train, held_out):
            if note_copies and self.labelled.held_out:
                _note_copies(train, held_out)
            labels_per_class = self._config.labels_per_class
            accuracies = probes.few_label_accuracies(train, held_out, labels_per_class=labels_per_class)
            return Scores(
                probes.knn_accuracy(train, held_out),
                probes.linear_accuracy(train, held_out),
                np.mean(accuracies),
                np.std(accuracies),
            )

        return Scores(*map(float, self._score(measure, represent)))

    def _score(self, score, represent):
        """Applies `score(train, held_out)` to the features that `represent(source)` makes."""
        from simclr_jax.data import datasets

        train, held_out = (source and _represent_labelled(represent, source) for source in self.labelled)
        if held_out:
            return score(train, held_out)
        return probes.cross_validated(score, train, datasets.readable_groups(self.labelled.train))


def notes(summary: dict[str, Any]) -> list[str]:
    """Returns a sentence for each baseline that the trained features do not beat in every score."""
    sentences = []
    for baseline in [name for name in _BASELINES if name in summary]:
        worse = [
            f"{name.replace('_', ' ')} {score:.3f} against {summary[baseline][name]:.3f}"
            for name, score in summary["trained"].items()
            if score <= summary[baseline][name]
        ]
        if worse:
            sentences.append(
                f"the trained features are no better than {_BASELINES[baseline]}: {', '.join(worse)}. With "
                "few images, start from published weights (docs/published.md); else train for more epochs"
            )
    return sentences


def _encode_views(model, variables, batch):
    outputs = {view: model.apply(variables, batch[view]) for view in ("view1", "view2")}
    return {f"{view}_{space}": outputs[view][space] for view in outputs for space in SPACES}


def _note_copies(train, held_out):
    count, looked_at = similarity.copies(*(features.unit_rows(rows.features) for rows in (train, held_out)))
    if count:
        report.say(
            f"note: {count:,} of {looked_at:,} held-out images are near-duplicates of training images "
            "by their features: if they show the same, scores are too high; --config.dataset.group keeps "
            "images of a folder together"
        )


def _find_labelled(config, source, load) -> Labelled | None:
    """Returns the labelled examples of a dataset, and notes which of them the scores leave out."""
    from simclr_jax.data import datasets

    if config.dataset.probe_split:
        source = load("probe")
    if not source.num_classes:
        return None
    if config.dataset.labels:
        source, held_out = labelled_by_csv(load)
        if not held_out and not probes.folds(source.labels, source.groups):
            return None
    else:
        held_out = load("eval")
        if not held_out.num_classes:
            return None

    sample = partial(datasets.sample, size=config.evaluate.max_examples, seed=config.seed)
    examples = Labelled(sample(_labelled_only(source)), held_out and sample(_labelled_only(held_out)))
    if held_out and all(part.random_access for part in examples):
        labels = [part.labels for part in examples]
        for note in probes.notes(*labels, labels_per_class=config.labels_per_class):
            report.say(f"note: {note}")
    return examples


def _labelled_only(source):
    from simclr_jax.data import datasets

    labelled = datasets.labelled(source)
    _check_labelled(source, labelled.num_examples)
    return labelled


def _represent_labelled(represent, source):
    rows = probes.labelled(represent(source))
    _check_labelled(source, len(rows.labels))  # The labels of a stream are not known before.
    return rows


def _check_labelled(source, count):
    if not count:
        raise UserError(
            f"{source.name} has classes, but none of its images has a label: set "
            "--config.dataset.probe_split and --config.dataset.eval_split to labelled splits"
        )

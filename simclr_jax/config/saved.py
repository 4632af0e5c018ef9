"""Completes configs that earlier runs have saved by the keys that came later."""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from simclr_jax.config import shipped


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved config with the defaults of the keys that it lacks.

    The config of a network that others trained has no dataset: it gets the keys of `model` alone, not those
    that say how it was trained.
    """
    defaults = shipped.defaults_of(config.get("task") or "pretrain").to_dict()
    if "dataset" not in config:
        defaults = {"model": defaults["model"]}
    return unflatten_dict(flatten_dict(defaults, sep=".") | flatten_dict(config, sep="."), sep=".")


def complete_model(model) -> ConfigDict:
    """Returns a `config.model`, or another object with its attributes, with the defaults of keys it lacks."""
    given = model.to_dict() if isinstance(model, ConfigDict) else vars(model)
    return ConfigDict(shipped.defaults_of("pretrain").model.to_dict() | given)

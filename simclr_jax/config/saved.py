"""Configs that earlier runs have saved, completed by the keys that came later."""

from typing import Any

from flax.traverse_util import unflatten_dict

from simclr_jax.config import shipped
from simclr_jax.workdir.records import flatten


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with the defaults of keys that its version had not yet.

    The config of an official checkpoint has no dataset and tells of the network alone: nothing is added to
    how it was trained.
    """
    base, config = shipped.base(), dict(config)
    if config.get("task", "") in ("", "pretrain"):
        defaults = base.pretrain()
    else:
        defaults = getattr(base, config["task"])(base.pretrain())
    defaults = defaults.to_dict() if "dataset" in config else {"model": defaults.model.to_dict()}
    flat = flatten(defaults) | flatten(config)
    return unflatten_dict({tuple(key.split(".")): value for key, value in flat.items()})

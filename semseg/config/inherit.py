"""The configuration for using a saved network: that of its run, with what the command line changes."""

from __future__ import annotations

from omegaconf import OmegaConf

from semseg.config.schema import Config
from semseg.config.uses import refuse_unused_sizes
from semseg.config.validate import check_config
from semseg.errors import ConfigError

# How a network is run; these do not change the network.
FREE_MODEL_KEYS = ("model.channels_last", "model.winograd", "model.compile")


def inherit_config(saved: Config, given: Config, overrides: list[str]) -> Config:
    """The configuration for using a checkpoint: the saved one with the overrides of the user.

    The network always comes from the checkpoint; data and evaluation settings come from it unless they are given on the
    command line (a whole group such as data=camvid, or single keys).

    Raises:
        ConfigError: if the command line requests another network, or sizes that this one does not use.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    for key in keys:
        if key.partition(".")[0].partition("/")[0] == "model" and key not in FREE_MODEL_KEYS:
            raise ConfigError(f"{key}: the network comes from ckpt, so it cannot be set here.")
    merged, ours = OmegaConf.structured(given), OmegaConf.structured(saved)
    merged.model = ours.model
    for section in ("data", "eval"):
        if section in keys or "experiment" in keys:
            continue
        kept = {key: OmegaConf.select(merged, key) for key in keys if key.startswith(f"{section}.")}
        merged[section] = ours[section]
        for key, value in kept.items():
            OmegaConf.update(merged, key, value)
    for key in FREE_MODEL_KEYS:
        if key in keys:
            OmegaConf.update(merged, key, OmegaConf.select(OmegaConf.structured(given), key))
    if "data.resize" not in keys:  # it belongs to the network, whatever images it is used on
        merged.data.resize = ours.data.resize
    if merged.data.resize == "native" and "data.crop" not in keys:
        merged.data.crop = ours.data.crop or ours.augment.crop
    merged.data.label_cache = given.data.label_cache  # a folder of this machine
    merged.eval.bootstrap = given.eval.bootstrap  # checkpoints of older versions have 0 where nothing was chosen
    config = check_config(merged, None)  # the use of `given` has been checked
    refuse_unused_sizes(config, overrides)
    return config

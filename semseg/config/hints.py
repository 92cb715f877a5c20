"""Suggest a key for one that does not exist. Works on names only, not on the configuration."""

from __future__ import annotations

from collections.abc import Iterable

from semseg.errors import find_nearest

# Options of Lightning's Trainer, current and former, and their replacement.
TRAINER_HINTS = {
    "auto_lr_find": "Sweep over optim.lr instead: hparams_search=grid.",
    "auto_scale_batch_size": "Set data.batch_size; trainer.probe_memory tries the largest sub-batch before training.",
    "barebones": "mode=bench times steps without logging and checkpoints.",
    "callbacks": "Set callbacks=early_stopping; checkpoint, ema and trainer.enable_progress_bar control the others.",
    "checkpoint_callback": "Set checkpoint.every_n_steps, checkpoint.every_n_minutes and checkpoint.keep.",
    "default_root_dir": "Set run_dir, the folder of this run, or runs_dir, the folder of all runs.",
    "enable_autolog_hparams": "The whole configuration is always logged and saved in <run folder>/config.yaml.",
    "enable_checkpointing": "Checkpoints are always written: see checkpoint.every_n_steps and checkpoint.keep.",
    "enable_model_summary": "The network is always described in <run folder>/model.txt; quiet=true prints nothing.",
    "gpus": "Set trainer.devices=<count or list> and trainer.accelerator=gpu.",
    "gradient_clip_algorithm": "Gradients are clipped by their norm, at trainer.gradient_clip_val.",
    "inference_mode": "Validation and evaluation never keep gradients.",
    "ipus": "Set trainer.accelerator and trainer.devices.",
    "limit_predict_batches": "Give fewer images as input=<pattern or list of paths>.",
    "limit_test_batches": "Set data.limit=<number of images>, of each split.",
    "logger": "Set logger=csv, tensorboard, csv_tensorboard, wandb or mlflow, without trainer.",
    "max_time": "Set trainer.max_epochs or trainer.max_steps; SIGTERM stops a run with a checkpoint to resume from.",
    "min_epochs": "A run trains trainer.max_epochs unless callbacks=early_stopping ends it: raise its patience.",
    "min_steps": "A run trains trainer.max_epochs unless callbacks=early_stopping ends it: raise its patience.",
    "model_registry": "Set logger=mlflow or logger=wandb; checkpoints stay in the run folder.",
    "num_gpus": "Set trainer.devices=<count or list> and trainer.accelerator=gpu.",
    "num_processes": "Set trainer.devices=<count> and trainer.accelerator=cpu.",
    "overfit_batches": "Set debug=overfit, or data.limit=<number of images>.",
    "plugins": "Set trainer.precision, trainer.strategy and syncbn.",
    "progress_bar_refresh_rate": "Set trainer.enable_progress_bar=true or false.",
    "reload_dataloaders_every_n_epochs": "Every epoch draws new sub-batches automatically.",
    "replace_sampler_ddp": "Every device always has its own sub-batches.",
    "resume_from_checkpoint": "Set resume=<checkpoint>, or nothing: a run folder with a checkpoint is resumed.",
    "stochastic_weight_avg": "Set ema.decay=0.999, a moving average of the weights.",
    "sync_batchnorm": "Set syncbn=reduce (the default), native or off.",
    "terminate_on_nan": "A NaN always stops a run: see trainer.max_nonfinite_steps.",
    "tpu_cores": "Set trainer.accelerator and trainer.devices.",
    "track_grad_norm": "Set trainer.gradient_clip_val to limit the norm of the gradients.",
    "use_distributed_sampler": "Every device always has its own sub-batches.",
    "val_check_interval": (
        "Set trainer.check_val_every_n_epoch=<epochs>, and data.steps_per_epoch=<steps> for the length of an epoch."
    ),
    "weights_save_path": "Set run_dir, the folder of this run.",
    "weights_summary": "The network is always described in <run folder>/model.txt.",
}
# Keys of earlier versions that were removed, and their replacement. Checkpoints and saved command lines may still hold
# them; they are ignored there.
REMOVED_KEYS = {
    "trainer.on_oom": (
        "A sub-batch that does not fit into memory ends the run: trainer.probe_memory tries the largest one before "
        "training, and data.batch_size, data.max_long_edge and data.short_edges set its size."
    ),
}
# Names of our keys in other programs, by the last part of the key.
KEY_SYNONYMS = {
    "amp": "trainer.precision",
    "arch": "model",
    "backbone": "model/encoder",
    "batch": "data.batch_size",
    "bs": "data.batch_size",
    "class_names": "data.classes",
    "crop_size": "augment.crop",
    "dataset": "data",
    "ema_decay": "ema.decay",
    "epoch": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "fp16": "trainer.precision",
    "grad_clip": "trainer.gradient_clip_val",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "head": "model/decoder",
    "ignore_index": "data.ignore",
    "image_size": "data.short_edges",
    "img_size": "data.short_edges",
    "imgsz": "data.short_edges",
    "learning_rate": "optim.lr",
    "lr_scheduler": "schedule",
    "n_epochs": "trainer.max_epochs",
    "nproc": "trainer.devices",
    "num_epochs": "trainer.max_epochs",
    "optimiser": "optim",
    "optimizer": "optim",
    "output_dir": "run_dir",
    "pretrained": "model.encoder.weights",
    "random_seed": "seed",
    "scheduler": "schedule",
    "steps": "trainer.max_steps",
    "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}
# Sections to which a program can add keys (semseg/config/tables.py), and what it adds.
EXTENDING = "docs/extending.md"
ADDED_BY_PROGRAMS = {
    "loss.terms": "a loss",
    "augment": "an augmentation",
    "callbacks": "a callback",
    "logger": "a logger",
}


def explain_unknown_key(key: str, valid: list[str]) -> str:
    """One line for a key that does not exist: its replacement, the nearest key, or the valid keys."""
    section, _, last = key.rpartition(".")
    if section in ("", "trainer") and last in TRAINER_HINTS:
        return f"There is no key {key!r}. {TRAINER_HINTS[last]}"
    removed = next((name for name in REMOVED_KEYS if key in (name, get_last_part(name))), None)
    if removed:
        return f"There is no key {key!r} any more. {REMOVED_KEYS[removed]}"
    added = next((what for name, what in ADDED_BY_PROGRAMS.items() if key.startswith(f"{name}.")), None)
    nearest = find_nearest_key(key, valid)
    if nearest and not (added and is_far_fetched(key, nearest)):
        return f"There is no key {key!r}. Did you mean {nearest}?"
    siblings = list(dict.fromkeys(name for name in valid if name.rpartition(".")[0] == section))
    if added and not siblings:
        return f"There is no key {key!r}. A program can add {added} of its own: {EXTENDING}."
    siblings = siblings or sorted({name.partition(".")[0] for name in valid if "/" not in name})
    program = f" A program can add {added} of its own: {EXTENDING}." if added else ""
    return f"There is no key {key!r}. Valid here: {', '.join(siblings)}.{program}"


def is_far_fetched(key: str, nearest: str) -> bool:
    """Whether `nearest` is of another section and only similar to `key`, which may be the name of a user's own part."""
    (section, _, last), other_section = key.rpartition("."), nearest.rpartition(".")[0]
    return section != other_section and last != get_last_part(nearest) and last not in KEY_SYNONYMS


def find_nearest_key(key: str, valid: list[str]) -> str | None:
    """The valid key most similar to `key`: its singular or plural, its last part in another section, a similar name.

    >>> find_nearest_key("lr", ["optim.lr", "optim.momentum"])
    'optim.lr'
    >>> find_nearest_key("optim.momentm", ["optim.lr", "optim.momentum"])
    'optim.momentum'
    >>> find_nearest_key("predict.scale", ["augment.scale", "predict.scales"])
    'predict.scales'
    """
    section, _, last = key.rpartition(".")
    within = [name for name in valid if name.rpartition(".")[0] == section]
    in_number = [name for name in within if section and get_last_part(name) in (f"{last}s", last.removesuffix("s"))]
    exact = [name for name in valid if get_last_part(name) == last]
    if in_number or exact:
        return pick_shortest(in_number or exact)
    sibling = find_nearest(last, map(get_last_part, within))
    if sibling:
        return next(name for name in within if get_last_part(name) == sibling)
    if last in KEY_SYNONYMS:
        return KEY_SYNONYMS[last]
    if section and within:  # only the last part is wrong
        similar = find_nearest(last, map(get_last_part, valid))
        return pick_shortest(name for name in valid if get_last_part(name) == similar) if similar else None
    whole = find_nearest(key, valid)
    if whole:
        return whole
    similar = find_nearest(last, map(get_last_part, valid))
    return pick_shortest(name for name in valid if get_last_part(name) == similar) if similar else None


def get_last_part(key: str) -> str:
    """The part of a key or group after its last dot or slash."""
    return key.replace("/", ".").rpartition(".")[2]


def pick_shortest(names: Iterable[str]) -> str | None:
    """The shortest key; a group is preferred to a section of equal length."""
    return min(names, key=lambda name: (len(name), "." in name), default=None)

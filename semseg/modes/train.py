"""mode=train: fit one network, keep its best and last checkpoint, and print how to continue."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from rich.console import Console

from semseg.build import build_data, build_module, build_trainer
from semseg.checkpoints.format import refuse_nonfinite_weights
from semseg.checkpoints.initialise import LoadReport, initialise_from
from semseg.checkpoints.network import build_network, check_class_names, check_network, report_one_size, without_weights
from semseg.config.schema import Config, LossConfig, config_to_plain
from semseg.data.classes import ClassTable
from semseg.data.label_windows import LabelWindows, open_label
from semseg.data.overlap import find_overlap
from semseg.data.pairs import name_origin
from semseg.data.records import take_evenly
from semseg.data.sources import DataSource, describe_named_splits, find_other_types, require_masks
from semseg.data.store import UnusedFiles
from semseg.datamodule import SegmentationData
from semseg.errors import ConfigError, DataError
from semseg.lit_module import SegmentationModule
from semseg.modes.automatic import choose_automatic, resolve_value_range
from semseg.modes.train_end import (
    best_result,
    describe_earlier_follow_ups,
    describe_last_checkpoint,
    find_best_checkpoint,
    finish,
    resume_command,
    run_follow_ups,
)
from semseg.modes.train_start import Start, lock_run_folder, prepare_checkpoint_folder, resolve_start
from semseg.modes.train_summary import (
    describe_data,
    describe_steps,
    describe_validation,
    describe_weights,
    print_details,
)
from semseg.nets.bands import inherit_convention
from semseg.nets.cost import measure_cost, write_cost
from semseg.nets.interfaces import SegmentationNetwork
from semseg.prediction.inputs import find_inputs
from semseg.prediction.predictor import check_decision
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd, shorten_overrides
from semseg.storage.ranks import is_first_rank, print_once
from semseg.storage.run_folders import CHECKPOINT_FOLDER, choose_follow_up_folder
from semseg.storage.run_results import RESULT_FILE, read_result
from semseg.system.process import StopRequest
from semseg.training.callbacks.stop import StoppedError, requeue
from semseg.training.loggers.external import log_settings
from semseg.training.same_run import check_same_conditions
from semseg.training.start_summary import LABEL_WIDTH, format_start
from semseg.training.training_state import report_restore_errors

PIPE_WIDTH = 120  # characters of a line where there is no terminal
NUM_CHECKED_LABELS = 8  # before anything slow happens


def run(config: Config, overrides: list[str]) -> float | None:
    """Train; returns the best mean IoU on the validation images (None without validation).

    Raises:
        SemsegError: for any error that the user can fix.
    """
    source = DataSource(config.data)
    source.training_records()  # missing files are reported before anything slow happens
    source = resolve_value_range(source)
    config = replace(config, data=source.config)
    run_dir = Path(config.run_dir)
    with lock_run_folder(run_dir):
        start = resolve_start(config, overrides, source)
        end = None if start.state is None else start.state.describe_end(start.config.trainer)
        if end is not None:
            print_once(end)
            result = read_result(run_dir)
            if result is not None:
                checkpoint = find_best_checkpoint(run_dir)
                if is_first_rank() and checkpoint is not None:
                    run_follow_ups(start.config, checkpoint, result, {})
                    for line in describe_earlier_follow_ups(start.config, checkpoint, result):
                        print_once(line)
                return result.score
            # Killed after its last step, before it finished: fit takes no step, and the rest follows.
        check_follow_ups(config, source)
        return train_network(start, overrides, source)


def check_follow_ups(config: Config, source: DataSource) -> None:
    """Report before training what the modes of after_training would refuse after it.

    Raises:
        SemsegError: if images or masks are missing, or the rules for the class of a pixel do not fit the classes.
    """
    if "eval" in config.after_training:
        require_masks(config.eval.split, source.records(config.eval.split))
    if "predict" not in config.after_training:
        return
    options = config.predict
    check_decision(options.threshold, options.min_confidence, source.label_map, source.classes.num_classes)
    if config.input and config.input != "-":
        find_inputs(config.input, choose_follow_up_folder(Path(config.run_dir), "predict"), unused=UnusedFiles())


def refuse_other_types(source: DataSource) -> None:
    """Refuse images of validation and of data.mix whose values are of another type than those of data.train.

    Raises:
        DataError: with both types.
    """
    sets = {"data.train": source.records("train")}
    sets |= {part.key: part.read_records() for part in source.parts}
    sets |= {"data.val": source.records("val")} if source.has("val") else {}
    images = {key: [record.image for record in records] for key, records in sets.items()}
    for found in find_other_types(source.bands, images):
        raise DataError(found)


def check_records(source: DataSource, world_size: int) -> None:
    """Report unused files and images that are in two splits, and refuse data that cannot be trained on.

    Raises:
        DataError: if train is smaller than one step, val has images without a mask, or pixel types differ.
    """
    records, batch_size = source.training_records(), source.config.batch_size
    if len(records) < batch_size * world_size:
        raise DataError(
            f"data.train has {len(records)} images, one step takes {batch_size * world_size}: "
            f"data.batch_size={batch_size} on {world_size} devices. Lower one of them."
        )
    print_once(source.describe_unused("train"))
    for part in source.parts:
        print_once(part.describe_unused())
    refuse_other_types(source)
    if source.has("val"):
        require_masks("val", source.records("val"))
        print_once(source.describe_unused("val"))
    if keys := source.find_named_splits():
        print_once(f"warning: {describe_named_splits(keys)}")
    common = find_overlap(records, source.records("val")) if source.has("val") else None
    if common is not None:
        print_once(f"warning: {common}")


def check_first_labels(source: DataSource, max_pixels: int) -> None:
    """Read a few labels of train, so that a wrong number of classes is reported before anything slow happens.

    Raises:
        DataError: if one cannot be read, or has an id that is neither a class nor ignored.
    """
    records = [record for record in source.training_records() if record.label]
    for record in take_evenly(records, NUM_CHECKED_LABELS):
        try:
            with open_label(record.label or "", record.label_map or source.label_map, max_pixels=max_pixels) as label:
                if isinstance(label, LabelWindows):
                    for _ in label.read_strips():  # which checks the ids
                        pass
        except DataError as error:
            raise name_origin(record, error) from error


def find_own_loss(net: SegmentationNetwork, config: Config, overrides: list[str]) -> str:
    """What the start says about a loss that the network has of its own; empty if it has none.

    A loss that comes with the data set or the recipe is for other networks.

    Raises:
        ConfigError: if the command line has a loss that this network would not use.
    """
    if not net.has_own_loss:
        return ""
    words = [word for word in overrides if re.match(r"\+*loss[.=]", word)]
    given = next((word for word in words if word != "loss=cross_entropy"), None)
    kind = "classes and masks, matched to each other"
    if given is not None and config.loss != LossConfig():
        raise ConfigError(
            f"{given}: has no effect, because {config.model.title} has a loss of its own ({kind}). Leave loss out."
        )
    return f"the network's own: {kind}"


def name_classes(start: Start, source: DataSource) -> None:
    """Give classes without names (data.classes=null) those that the run had, or those of its initial weights."""
    model, given = start.config.model, start.config.data
    names: ClassTable | None = None
    if given.classes is not None:
        return
    if start.state is not None:
        names = start.state.classes
    elif model.library == "transformers" and start.network is None:
        from semseg.nets.libraries.description import describe_hub_network  # noqa: PLC0415 - an extra

        names = describe_hub_network(model.name, model.revision, start.config.download).class_table
    if names is not None and names.num_classes == source.classes.num_classes:
        source.classes = names


def train_network(start: Start, overrides: list[str], source: DataSource) -> float | None:
    """Fit from `start` to the end of the run; returns the best score."""
    config, choices, state = start.config, start.choices, start.state
    run_dir = Path(config.run_dir)
    name_classes(start, source)
    if state is None:
        config, choices = choose_automatic(config, overrides, source)
    pl.seed_everything(config.seed, verbose=False)
    trainer = build_trainer(config, source)
    check_records(source, trainer.world_size)
    if start.network is not None:
        if source.classes.num_classes == start.network.classes.num_classes:  # its classifier is kept, too
            check_class_names(source.classes, config.data.name, start.network)
        check_network(start.network)
        refuse_nonfinite_weights(start.network.weights, start.network.source)
    if state is None and config.data.on_bad == "error":
        check_first_labels(source, config.data.max_pixels)  # before ImageNet weights are downloaded
    model = config.model if start.kind == "scratch" else without_weights(config.model)
    net = build_network(model, source.classes.num_classes, config.download, source.bands_of("train"))
    own_loss = find_own_loss(net, config, overrides)
    library = {"config": net.library_config, "revision": net.revision or config.model.revision}
    config = replace(config, model=replace(config.model, **library))
    report_one_size(net, config.model)
    data = build_data(config, source, net)
    data.trainer = trainer  # as trainer.fit does
    plain = config_to_plain(config)
    if state is not None:
        for line in check_same_conditions(state, plain, data.run_conditions(), force=config.resume_force):
            print_once(line)
        if trainer.is_global_zero:
            prepare_checkpoint_folder(state, run_dir / CHECKPOINT_FOLDER, config.resume)
    console = Console(quiet=not trainer.is_global_zero)
    log_settings(trainer.loggers, plain)
    loaded = initialise_network(net, start, source)
    if trainer.is_global_zero:
        write_config(run_dir, plain)
        cost = measure_cost(deepcopy(net).to("meta"))
        write_cost(run_dir / "model.txt", cost)
        if config.verbose:
            print_details(console, plain, overrides, start, loaded)
        width = console.width if console.is_terminal else PIPE_WIDTH
        rows = {
            "network": f"{config.model.title}: {cost}",
            "weights": describe_weights(start, loaded, data),
            "loss": own_loss,
            **describe_data(source, width - LABEL_WIDTH),
            **describe_steps(config, trainer, data),
            **({} if state is not None else describe_validation(config.trainer, data)),
            "automatic": ", ".join(map(str, choices)),
            "run folder": str(relative_to_cwd(run_dir)),
        }
        for line in format_start(rows, shorten_overrides(overrides), width):
            console.print(line, soft_wrap=True)
    module = build_module(config, net, source.classes)
    if not fit_network(trainer, module, data, start, overrides):
        return None
    result = best_result(trainer)
    finish(config, overrides, trainer, console, result)
    return result.score


def initialise_network(net: SegmentationNetwork, start: Start, source: DataSource) -> LoadReport | None:
    """Load the initial weights of a run that starts from another network, and take over its preprocessing."""
    if start.network is None:
        return None
    print_once(start.network.note)
    loaded = initialise_from(net, start.network)
    net.origin = start.network.origin
    if start.config.model.convention == "auto":
        net.convention = inherit_convention(start.network.convention, source.bands_of("train"))
    return loaded


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a run that begins or resumes, and remove the result of an earlier end."""
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    with atomic_write(run_dir / "config.yaml") as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def fit_network(
    trainer: pl.Trainer, module: SegmentationModule, data: SegmentationData, start: Start, overrides: list[str]
) -> bool:
    """Fit, and say what to do about a run that stops; returns False if a job of SLURM will resume it.

    Raises:
        DataError: for an image that cannot be read, with the key that leaves it out.
        StoppedError: if the run was stopped, with the command that resumes it.
    """
    config = start.config
    try:
        with report_restore_errors(trainer, path := start.state.path if start.state else None):
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except DataError as error:
        if config.data.on_bad == "skip":
            raise
        advice = "To train without images that are damaged or do not fit, give data.on_bad=skip."
        raise DataError(f"{error} {advice}") from error
    except StopRequest:  # a second Ctrl-C, or one before the first step: no checkpoint is written now
        print_once(describe_last_checkpoint(config, overrides))
        raise
    except StoppedError as stopped:
        job = requeue(stopped.number, is_first_rank=trainer.is_global_zero)
        if job is not None:
            print_once(f"{stopped} SLURM job {job} is requeued and will resume by itself.")
            return False
        raise StoppedError(f"{stopped} To resume: {resume_command(config, overrides)}", stopped.number) from None
    return True

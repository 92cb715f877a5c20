"""mode=check: read every mask, report what would stop or spoil a run, and write check.json and a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import NoReturn

from rich.progress import track

from semseg.build import choose_label_stride
from semseg.checks.bands import advise_on_bands
from semseg.checks.dataset import (
    ERROR,
    MAX_EXAMPLES,
    NOT_READY,
    NOTE,
    WARNING,
    ConfiguredClasses,
    Diagnosis,
    Notice,
    ScannedSplit,
    check_files,
    check_reading,
    diagnose,
    join_first,
    padding_fraction,
    sort_notices,
    with_zero_unlabelled,
)
from semseg.checks.objects import check_objects
from semseg.checks.recipe import BASE_RECIPE, write_recipe
from semseg.config.load import load_config
from semseg.config.override_keys import list_given_keys
from semseg.config.recipes import find_experiment
from semseg.config.schema import SPLITS, Config, DataConfig
from semseg.data.bands import band_options
from semseg.data.classes import ClassTable
from semseg.data.crops import NATIVE, choose_crop
from semseg.data.foreground import build_foreground_index
from semseg.data.geometry import Size
from semseg.data.header_cache import find_pixel_type
from semseg.data.importing.formats import FoundExport
from semseg.data.importing.recognise import name_output, recognise_exports, recognise_masks_beside
from semseg.data.label_map import LabelMap
from semseg.data.overlap import Overlap, find_overlap
from semseg.data.pairs import read_pair, read_shown
from semseg.data.plan import TrainPlan
from semseg.data.records import Record
from semseg.data.scan import find_first_pixel, scan_pairs
from semseg.data.sources import ROOT_OF_LISTS, DataSource, describe_named_splits, find_other_types, name_part
from semseg.data.training_size import TrainingSizes
from semseg.errors import DataError, ReportedError
from semseg.modes.check_recipe import (
    build_meta_network,
    check_command,
    choose_recipe,
    collect_facts,
    training_command,
)
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.nets.step_memory import estimate_step_memory
from semseg.reports.check_page import CheckedSample, CheckReport, PlanSummary
from semseg.reports.check_report import print_check_report, write_check_report
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import format_command, relative_to_cwd
from semseg.system.text import escape_lines, format_quantity

NUM_PLANNED = 500  # sub-batches whose padding is measured


def run(config: Config, overrides: list[str]) -> None:
    """Scan all splits and report the findings; write the description of the data set to `output` if it is ready.

    Raises:
        DataError: after the report, if a run would fail.
        ConfigError: after the report, if `output` exists with another content.
        SemsegError: for other errors that the user can fix.
    """
    folder = Path(config.run_dir)
    if exports := recognise_exports(config.data):
        report_exports(exports, config)
    config, overrides = use_masks_beside(config, overrides)
    advice = advise_on_bands(config.data, open_data(config.data)[0].survey("train")[0])
    if advice.suggestions:
        given = " ".join(f"{key}={value}" for key, value in advice.suggestions.items())
        print(escape_lines(f"the images are more than 8-bit RGB: checked with {given}"))
        config.data = advice.data
    source, configured = open_data(config.data)
    splits = [scan_split(source, split) for split in SPLITS if source.has(split)]
    diagnosis = diagnose(splits, config.data, configured, find_shared_images(splits), partial(find_pixel, source))
    drop_given_preferences(diagnosis.suggestions, overrides)
    if keys := source.find_named_splits():
        diagnosis.notices[:] = sort_notices([*diagnosis.notices, Notice(WARNING, describe_named_splits(keys))])
        diagnosis.suggestions.update(keys)
    has_pairs = bool(splits[0].usable_pairs)
    net = build_meta_network(config, source.classes.num_classes, source.bands) if has_pairs else None
    objects = check_small_objects(config, source, splits[0], configured, net)
    mixed = check_mix(source, splits, configured)
    types = check_pixel_types(source, splits)
    diagnosis.notices[:] = sort_notices([*diagnosis.notices, *advice.notices, *objects, *mixed, *types])
    diagnosis.suggestions.update(advice.suggestions)
    if config.check.fix == "list":
        diagnosis.suggestions.update(write_lists(folder, source, splits, configured))
    is_ready = diagnosis.verdict != NOT_READY
    output = Path(config.output).expanduser() if config.output else None
    label_map, classes = resolve_classes(config.data, source, diagnosis)
    suggestions = diagnosis.suggestions
    purpose = "to train" if is_ready else "to check" if suggestions else "to check again"
    report = CheckReport(
        name=config.data.name,
        diagnosis=diagnosis,
        splits=splits,
        plan=summarise_plan(config, splits[0], net),
        samples=list(sample_pairs(splits[0], config.check.samples, config.data, label_map, classes)),
        command=training_command(overrides, suggestions, output) if is_ready else check_command(overrides, diagnosis),
        purpose=f"{purpose} as suggested" if suggestions else purpose,
    )
    files = write_check_report(folder, report)
    print_check_report(report, files)
    next_step = escape_lines(f"{report.purpose}: {report.command}")
    if is_ready:
        if output is not None:
            facts = collect_facts(config.data, diagnosis, splits[0], label_map, classes)
            base = find_experiment(overrides)
            content, reasons = choose_recipe(config, overrides, diagnosis, facts, output)
            write_recipe(output, content, reasons, report.command, base or BASE_RECIPE)
            print(escape_lines(f"written to {relative_to_cwd(output)}: the data set, and settings with their reasons"))
        print(next_step)
        return
    if output is not None:
        print(escape_lines(f"nothing is written to {relative_to_cwd(output)} before the data set is ready"))
    print_other_checks(config, overrides, diagnosis, splits)
    print(next_step)
    error = DataError if config.quiet else ReportedError
    raise error(f"the data set is not ready for training: see {relative_to_cwd(files[-1])}.")


def drop_given_preferences(suggestions: dict[str, str], overrides: Sequence[str]) -> None:
    """Drop the suggestions that a run does not need, for what was given: images may be enlarged on purpose."""
    given = list_given_keys(overrides)
    dropped = {key for key in ("data.short_edges", "eval.scales", "data.steps_per_epoch") if key in given}
    if "data.short_edges" in dropped:
        dropped.add("eval.scales")  # which is that of the suggested edges
    for key in dropped:
        suggestions.pop(key, None)


def use_masks_beside(config: Config, overrides: list[str]) -> tuple[Config, list[str]]:
    """The configuration and its overrides, with the keys that name the masks if they lie beside the images."""
    keys = recognise_masks_beside(config.data)
    if not keys:
        return config, overrides
    words = [f"{key}={value}" for key, value in keys.items()]
    print(escape_lines(f"masks lie beside the images: checked with {' '.join(words)}"))
    overrides = [*overrides, *words]
    completed = load_config([word for word in overrides if not word.startswith(("run_dir=", "hydra."))])[0]
    completed.run_dir = config.run_dir
    return completed, overrides


def report_exports(exports: Sequence[FoundExport], config: Config) -> NoReturn:
    """Print how to import what is not a data set yet.

    Raises:
        DataError: always, after the report.
    """
    root = config.data.root
    output = find_free_name(name_output(Path(root)))
    for export in exports:
        shown = ", ".join(str(relative_to_cwd(path)) for path in export.files[:2])
        more = ", ..." if len(export.files) > 2 else ""
        text = (
            f"{root} is an export of {export.title} ({shown}{more}): its annotations have to be drawn as masks first."
        )
        print(escape_lines(text))
    print(f"\n{NOT_READY}")
    for export in exports:
        chosen = [f"import.format={export.format}"] if len(exports) > 1 else []
        print(
            escape_lines(f"to import: {format_command(['mode=import', f'input={root}', f'output={output}', *chosen])}")
        )
    error = DataError if config.quiet else ReportedError
    raise error(f"{root} is an export of an annotation tool, not a data set: use mode=import.")


def find_free_name(folder: Path) -> Path:
    """The folder, or one with a number behind its name, that does not exist."""
    names = (folder, *(folder.with_name(f"{folder.name}_{number}") for number in range(2, 1000)))
    return next((name for name in names if not name.exists()), folder)


def open_data(data: DataConfig) -> tuple[DataSource, ConfiguredClasses | None]:
    """The data set, and the meaning of its ids: None if neither data.classes nor data.num_classes is set.

    Raises:
        SemsegError: if the configuration or the data are otherwise incomplete.
    """
    if data.num_classes is None and data.classes is None:
        return DataSource(replace(data, num_classes=2)), None
    source = DataSource(data)
    return source, ConfiguredClasses(source.label_map, source.classes)


def scan_split(source: DataSource, split: str) -> ScannedSplit:
    """Scan a split, with a progress bar.

    Raises:
        DataError: if a folder or list is missing.
    """
    records, problems = source.survey(split)
    colours = source.label_map.colours
    bands = source.bands
    if bands is not None:
        bands = replace(bands, dtype=find_pixel_type(record.image for record in records))
    is_native = source.config.resize == NATIVE
    findings = scan_pairs(
        records, source.root, max_pixels=source.config.max_pixels, colours=colours, bands=bands, is_native=is_native
    )
    bar = track(findings, f"reading {split}", len(records), disable=not sys.stdout.isatty())
    return ScannedSplit(split, records, list(bar), problems, source.orientations[split], source.describe_unused(split))


def find_pixel(source: DataSource, record: Record, raw_id: int) -> tuple[int, int]:
    """(row, column) of the first pixel of an id in the mask of a record."""
    colours, limit = source.label_map.colours, source.config.max_pixels
    return find_first_pixel(record.label or "", raw_id, colours, limit)


def summarise_plan(config: Config, train: ScannedSplit, net: SegmentationNetwork | None) -> PlanSummary | None:
    """Padding, and the memory for the largest sub-batch, of the plan for the images of train; None without images.

    Args:
        net: of `build_meta_network`; None without images.
    """
    data = config.data
    sizes = [Size(facts.height, facts.width) for _, facts in train.usable_pairs]
    if net is None:
        return None
    crop = choose_crop(data, config.augment, net.image_size)
    divisor = net.image_size.height if net.image_size else choose_size_divisor(net, config.model.size_divisor)
    training = TrainingSizes(data, config.augment, crop, divisor)
    plan = TrainPlan(
        training.list_planned(sizes),
        seed=config.seed,
        batch_size=data.batch_size,
        short_edges=[0] if data.resize == NATIVE else data.short_edges,
        flip=data.flip,
    )
    list_members = partial(training.list_members, sizes=sizes, seed=config.seed)
    padding = padding_fraction(plan, list_members, divisor, NUM_PLANNED)
    canvas = training.find_largest(sizes)
    memory = estimate_step_memory(net, canvas, data.batch_size)
    return PlanSummary(padding, canvas, data.batch_size, config.model.title, memory and memory.with_momentum)


def check_small_objects(
    config: Config,
    source: DataSource,
    train: ScannedSplit,
    configured: ConfiguredClasses | None,
    net: SegmentationNetwork | None,
) -> list[Notice]:
    """Whether objects vanish from the labels of training; makes the index of data.resize=native on the way.

    Args:
        net: of `build_meta_network`; None without images.
    """
    if configured is None or net is None:
        return []
    label_map, names, data = configured.label_map, configured.classes.names, config.data
    if data.resize == NATIVE and data.crop_foreground != 0:
        records = [record for record, _ in train.usable_pairs]
        build_foreground_index(records, source.root, label_map, max_pixels=data.max_pixels)
    return check_objects(train, label_map.class_index, names, data, choose_label_stride(config, net))


def check_mix(
    source: DataSource, splits: Sequence[ScannedSplit], configured: ConfiguredClasses | None
) -> Iterator[Notice]:
    """What is wrong with the further data sets of training (data.mix), and a note about each of them.

    Nothing is said of them before the classes of the main data set are known.

    Raises:
        SemsegError: if one of them is missing, or has a class without a counterpart.
    """
    if configured is None:
        return
    validation = next((split.records for split in splits if split.name == "val"), [])
    for part in source.parts:
        with name_part(part.key):
            scanned = scan_split(part.source, "train")._replace(name=part.key)
        own = ConfiguredClasses(part.source.label_map, part.source.classes)
        found = diagnose([scanned], part.source.config, own, None, partial(find_pixel, part.source))
        yield from (
            notice if notice.text.startswith(part.key) else notice._replace(text=f"{part.key}: {notice.text}")
            for notice in found.notices
            if notice.level == ERROR or notice in (*check_files(scanned), *check_reading(scanned))
        )
        shared = find_overlap(scanned.records, validation)
        if shared is not None:
            files = (*shared.same_path, *shared.same_content)[:MAX_EXAMPLES]
            yield Notice(WARNING, f"{part.key}: {shared}", files)
        present = {part.label_map.class_index(raw) for _, facts in scanned.usable_pairs for raw in facts.ids}
        names = [name for index, name in enumerate(source.classes.names) if index in present]
        yield Notice(
            NOTE,
            f"{part.key}: {format_quantity(len(scanned.usable_pairs), 'pair')} for {part.share:.0%} of the training "
            f"images, with {len(names)} of {source.classes.num_classes} classes: {join_first(names)}.",
        )


def check_pixel_types(source: DataSource, splits: Sequence[ScannedSplit]) -> Iterator[Notice]:
    """Notices about sets of images whose values are of another type than those of data.train."""
    if source.bands is None:
        return
    sets = {f"data.{split.name}": split.records for split in splits}
    sets |= {part.key: part.source.survey("train")[0] for part in source.parts}
    images = {key: [record.image for record in records] for key, records in sets.items()}
    for text in find_other_types(source.bands, images):
        yield Notice(WARNING if text.startswith("data.test") else ERROR, text)  # training does not read data.test


def print_other_checks(
    config: Config, overrides: Sequence[str], diagnosis: Diagnosis, splits: Sequence[ScannedSplit]
) -> None:
    """Print the commands that would mend a data set in another way than the one that is suggested."""
    if not diagnosis.classes and (others := with_zero_unlabelled(diagnosis.suggestions)):
        command = check_command(overrides, diagnosis._replace(suggestions=others))
        print(escape_lines(f"to check with 0 as unlabelled: {command}"))
    has_unusable = any(split.problems or len(split.usable_pairs) < len(split.records) for split in splits)
    if has_unusable and splits[0].usable_pairs and config.check.fix == "none":
        command = check_command([*overrides, "check.fix=list"], diagnosis)
        print(escape_lines(f"to leave out what cannot be used: {command}"))


def find_shared_images(splits: Sequence[ScannedSplit]) -> Overlap | None:
    """Find the images that are in train and in val."""
    records = {split.name: split.records for split in splits}
    return find_overlap(records["train"], records["val"]) if {"train", "val"} <= set(records) else None


def resolve_classes(data: DataConfig, source: DataSource, diagnosis: Diagnosis) -> tuple[LabelMap, ClassTable]:
    """The meaning of the ids: as configured, or else as suggested."""
    advice = diagnosis.suggestions
    if diagnosis.classes or "data.num_classes" not in advice:
        return source.label_map, source.classes
    completed = replace(
        data,
        num_classes=int(advice["data.num_classes"]),
        first_id=int(advice.get("data.first_id", data.first_id)),
        ignore=json.loads(advice["data.ignore"]) if "data.ignore" in advice else data.ignore,
        map=parse_map(advice["data.map"]) if "data.map" in advice else data.map,
    )
    suggested = DataSource(completed)
    return suggested.label_map, suggested.classes


def parse_map(text: str) -> dict[str, int | None]:
    """The value of data.map that `suggest_ids` gives.

    >>> parse_map("{0:0,200:1,255:null}")
    {'0': 0, '200': 1, '255': None}
    """
    items = [item.split(":") for item in text.strip("{}").split(",")]
    return {raw_id: None if index == "null" else int(index) for raw_id, index in items}


def sample_pairs(
    split: ScannedSplit, count: int, data: DataConfig, label_map: LabelMap, classes: ClassTable
) -> Iterator[CheckedSample]:
    """Images at equal distances in a split, with their masks; masks with unknown ids are left out."""
    records = [record for record, _ in split.usable_pairs]
    count = min(count, len(records))
    for number in range(count):
        record = records[number * len(records) // count]
        try:
            label = read_pair(record, label_map, max_pixels=data.max_pixels, bands=band_options(data)).label
            image = read_shown(record, label_map, data)
        except DataError:
            continue
        assert label is not None
        yield CheckedSample(record.image, image, label, classes)


def write_lists(
    folder: Path, source: DataSource, splits: Sequence[ScannedSplit], configured: ConfiguredClasses | None
) -> dict[str, str]:
    """Write an odgt list of the usable pairs of each split, and return the overrides that use it."""
    root = source.root
    class_of = configured.label_map.class_index if configured else None
    keys = {}
    for split in splits:
        path = folder / f"{split.name}.odgt"
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record, facts in split.usable_pairs:
                if class_of is None or all(class_of(raw) is not None for raw in facts.ids):
                    file.write(json.dumps(odgt_entry(record, facts.height, facts.width, root)) + "\n")
        keys[f"data.{split.name}.list"] = str(path.absolute())
    # The lists are relative to the working directory, as the folders of data.images are.
    return keys | (ROOT_OF_LISTS if source.config.images else {})


def odgt_entry(record: Record, height: int, width: int, root: Path) -> dict[str, str | int]:
    """The entry of an odgt list for one record."""
    image, label = (relpath(path, root) for path in (record.image, record.label or ""))
    return {"fpath_img": image, "fpath_segm": label, "width": width, "height": height}

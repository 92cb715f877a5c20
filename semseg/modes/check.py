"""mode=check: read every mask, report what would stop or spoil a run, and write check.json and a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from os.path import relpath
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from semseg.build import choose_label_stride
from semseg.checkpoints.network import build_network, without_weights
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
    SplitSummary,
    Spread,
    check_files,
    check_reading,
    diagnose,
    format_ranges,
    join_first,
    padding_fraction,
    sort_notices,
    with_zero_unlabelled,
)
from semseg.checks.description import describe_data_set
from semseg.checks.objects import MIN_OBJECTS, check_objects, summarise_objects, view_of
from semseg.checks.recipe import (
    BASE_RECIPE,
    DataFacts,
    Machine,
    choose_settings,
    list_chosen_options,
    make_recipe,
    read_recipe,
    write_recipe,
)
from semseg.config.load import load_config
from semseg.config.override_keys import list_given_keys, override_key, split_override
from semseg.config.schema import FINE_STRIDE, SPLITS, Config, DataConfig, flatten_sections
from semseg.config.uses import find_idle_data_keys
from semseg.data.bands import BandOptions, band_options
from semseg.data.classes import ClassTable
from semseg.data.crops import NATIVE, choose_crop
from semseg.data.foreground import build_foreground_index
from semseg.data.geometry import Size, canvas_size
from semseg.data.header_cache import find_pixel_type
from semseg.data.importing.formats import FoundExport
from semseg.data.importing.recognise import name_output, recognise_exports, recognise_masks_beside
from semseg.data.label_map import LabelMap
from semseg.data.overlap import Overlap, find_overlap
from semseg.data.pairs import read_pair, read_shown
from semseg.data.plan import TrainPlan
from semseg.data.records import Record
from semseg.data.scan import find_first_pixel, scan_pairs
from semseg.data.sources import ROOT_OF_LISTS, DataSource, describe_named_splits, name_part
from semseg.data.training_size import TrainingSizes
from semseg.errors import DataError, ReportedError
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.step_memory import estimate_step_memory
from semseg.reports.check_page import CheckedSample, CheckReport, PlanSummary, write_check_page
from semseg.reports.draw import format_share
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import format_command, relative_to_cwd
from semseg.system.memory import get_total_memory
from semseg.system.text import escape_lines, escape_unprintable, format_quantity

ASSUMED_MEMORY = 8 * 2**30  # bytes, of a machine that does not say how much it has
PLACE_KEYS = ("data.images", "data.masks")  # which lists cannot stand beside
RECIPE_RATES = ("optim.lr", "optim.lr_encoder")
NUM_PLANNED = 500  # sub-batches whose padding is measured
OWN_WORDS = ("mode=", "check.", "run_dir=", "output=")  # beginnings of overrides that are for the check alone
MAX_CLASS_ROWS = 20  # rows on the console; the files have all classes


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
    if keys := source.find_named_splits():
        diagnosis.notices[:] = sort_notices([*diagnosis.notices, Notice(WARNING, describe_named_splits(keys))])
        diagnosis.suggestions.update(keys)
    has_pairs = bool(splits[0].usable_pairs)
    net = build_shapes(config, source.classes.num_classes, source.bands) if has_pairs else None
    objects = check_small_objects(config, source, splits[0], configured, net)
    mixed = check_mix(source, splits, configured)
    diagnosis.notices[:] = sort_notices([*diagnosis.notices, *advice.notices, *objects, *mixed])
    diagnosis.suggestions.update(advice.suggestions)
    if config.check.fix == "list":
        diagnosis.suggestions.update(write_lists(folder, source, splits, configured))
    is_ready = diagnosis.verdict != NOT_READY
    output = Path(config.output).expanduser() if config.output else None
    label_map, classes = resolve_classes(config.data, source, diagnosis)
    purpose = "to train" if is_ready else "to check" if diagnosis.suggestions else "to check again"
    report = CheckReport(
        config.data.name,
        diagnosis,
        splits,
        summarise_plan(config, splits[0], net),
        list(sample_pairs(splits[0], config.check.samples, config.data, label_map, classes)),
        training_command(overrides, diagnosis.suggestions, output) if is_ready else check_command(overrides, diagnosis),
        f"{purpose} as suggested" if diagnosis.suggestions else purpose,
    )
    files = write_report(folder, report)
    print_report(report, files)
    next_step = escape_lines(f"{report.purpose}: {report.command}")
    if is_ready:
        if output is not None:
            facts = collect_facts(config.data, diagnosis, splits[0], label_map, classes)
            base = find_base_recipe(overrides)
            content, reasons = choose_recipe(config, overrides, diagnosis, facts, output)
            write_recipe(output, content, reasons, report.command, base or BASE_RECIPE)
            print(escape_lines(f"written to {relative_to_cwd(output)}: the data set, and settings with their reasons"))
        print(next_step)
        return
    if output is not None:
        print(escape_lines(f"nothing is written to {relative_to_cwd(output)} before the data set is ready"))
    if configured is None and (others := with_zero_unlabelled(diagnosis.suggestions)):
        command = check_command(overrides, diagnosis._replace(suggestions=others))
        print(escape_lines(f"to check with 0 as unlabelled: {command}"))
    print(next_step)
    error = DataError if config.quiet else ReportedError
    raise error(f"the data set is not ready for training: see {relative_to_cwd(files[-1])}.")


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


def build_shapes(config: Config, num_classes: int, bands: BandOptions | None = None) -> SegmentationNetwork:
    """The network without the content of its weights, in training mode."""
    with torch.device("meta"):
        return build_network(without_weights(config.model), num_classes, config.download, bands).train()


def summarise_plan(config: Config, train: ScannedSplit, net: SegmentationNetwork | None) -> PlanSummary | None:
    """Padding, and the memory for the largest sub-batch, of the plan for the images of train; None without images.

    Args:
        net: of `build_shapes`; None without images.
    """
    data = config.data
    sizes = [Size(facts.height, facts.width) for _, facts in train.usable_pairs]
    if net is None:
        return None
    crop = choose_crop(data, config.augment, net.image_size)
    divisor = net.image_size.height if net.image_size else config.model.size_divisor or net.size_divisor
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
    return PlanSummary(padding, canvas, data.batch_size, config.model.title, memory.with_momentum)


def check_small_objects(
    config: Config,
    source: DataSource,
    train: ScannedSplit,
    configured: ConfiguredClasses | None,
    net: SegmentationNetwork | None,
) -> list[Notice]:
    """Whether objects vanish from the labels of training; makes the index of data.resize=native on the way.

    Args:
        net: of `build_shapes`; None without images.
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
        first_id=int(advice["data.first_id"]),
        ignore=json.loads(advice["data.ignore"]),
        map={"0": 0, "255": 1} if "data.map" in advice else None,
    )
    suggested = DataSource(completed)
    return suggested.label_map, suggested.classes


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


def training_command(overrides: Sequence[str], suggestions: dict[str, str], output: Path | None) -> str:
    """The command that trains with all suggestions; what `output` holds is left out if it is given."""
    words = apply_suggestions(overrides, suggestions)
    if output is not None:
        words = [f"experiment={relative_to_cwd(output)}", *leave_out_data(overrides)]
    return format_command(words)


def leave_out_data(overrides: Sequence[str]) -> list[str]:
    """The overrides that are neither about the data set nor for the check alone."""
    return [
        word
        for word in overrides
        if not word.startswith((*OWN_WORDS, "experiment=")) and override_key(word).partition(".")[0] != "data"
    ]


def check_command(overrides: Sequence[str], diagnosis: Diagnosis) -> str:
    """The command that checks again, with all suggestions."""
    own = [word for word in overrides if word.startswith(OWN_WORDS) and not word.startswith("mode=")]
    return format_command(["mode=check", *apply_suggestions(overrides, diagnosis.suggestions), *own])


def apply_suggestions(overrides: Sequence[str], suggestions: dict[str, str]) -> list[str]:
    """The overrides of a run on the checked data set, with suggestions in place of those with the same keys.

    Lists take the place of folders, and of all else that says where images are.
    """
    kept = [word for word in overrides if not word.startswith(OWN_WORDS) and override_key(word) not in suggestions]
    suggested = [f"{key}={value}" for key, value in suggestions.items()]
    if any(key.endswith(".list") for key in suggestions):
        kept = [word for word in kept if "data.train.list" not in suggestions or override_key(word) not in PLACE_KEYS]
        idle = dict(find_idle_data_keys(load_config(["mode=check", *kept, *suggested])[0].data))
        kept = [word for word in kept if override_key(word) not in idle]
    return [*kept, *suggested]


def describe_checked_data(overrides: Sequence[str], suggestions: dict[str, str], output: Path) -> dict[str, Any]:
    """The section `data` of the recipe: the data set with all suggestions."""
    words = ["mode=check", *apply_suggestions(overrides, suggestions)]
    data, base = (load_config(each)[0].data for each in (words, ["data=folder"]))
    return describe_data_set(data if data.name != base.name else replace(data, name=output.stem), base, output)


def collect_facts(
    data: DataConfig, diagnosis: Diagnosis, train: ScannedSplit, label_map: LabelMap, classes: ClassTable
) -> DataFacts:
    """What a recipe is chosen by."""
    sizes = [Size(facts.height, facts.width) for _, facts in train.usable_pairs]
    objects = summarise_objects(train, label_map.class_index, classes.names, view_of(data, FINE_STRIDE))
    sides = {each.name: each.median_side for each in objects if each.num_objects >= MIN_OBJECTS}
    shares = [row.share for row in diagnosis.classes]
    return DataFacts(sizes, shares, sides, len(data.band_names) == 3)


def find_base_recipe(overrides: Sequence[str]) -> str | None:
    """The experiment of the command line, on which its recipe is based; None: that of a recipe by default."""
    chosen = [value for key, value in map(split_override, overrides) if key == "experiment"]
    return chosen[-1].strip("\"'") if chosen else None


def choose_recipe(
    config: Config, overrides: Sequence[str], diagnosis: Diagnosis, facts: DataFacts, output: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of `output`, and the reason of each of its settings by key."""
    data = describe_checked_data(overrides, diagnosis.suggestions, output)
    others = leave_out_data(overrides)
    chosen = find_base_recipe(overrides)
    base = read_recipe(chosen or BASE_RECIPE)
    is_network_given = any(key.startswith("model") for key in list_given_keys(others))
    recipe_words = [] if is_network_given else [f"experiment={chosen or BASE_RECIPE}"]
    network = load_config([*recipe_words, "data=folder", "data.num_classes=2", *others])[0]
    net = build_shapes(network, len(diagnosis.classes))

    def estimate_memory(size: Size, batch_size: int) -> int:
        canvas = net.image_size or canvas_size([size], net.size_divisor)
        return estimate_step_memory(net, canvas, batch_size).with_momentum

    given = list_given_keys(overrides)
    if config.data.resize == NATIVE or "data.resize" in given:
        facts = facts._replace(given_resize=config.data.resize)
    described = dict(flatten_sections({"data": data}))
    given_data = [key for key in (*described, *given) if key.startswith("data.") and key not in diagnosis.suggestions]
    if "data.short_edges" in given_data:
        facts = facts._replace(given_edge=max(config.data.short_edges))
    rates = {key: value for key, value in flatten_sections(base) if key in RECIPE_RATES and not chosen}
    others = [word for word in others if word != "optim.lr=auto"]  # which is computed from the rate of the recipe
    if "optim.lr" in list_given_keys(others):
        rates.pop("optim.lr", None)
    machine = measure_machine(config)
    if list_chosen_options(base).get("model/encoder") != "timm":
        machine = machine._replace(has_timm=True)  # nothing has to take its place
    choices = choose_settings(facts, machine, rates, estimate_memory)
    if net.image_size is not None:  # the network's size is that of the crops
        choices = [choice for choice in choices if choice.key not in ("data.crop", "augment.crop")]
    recipe, reasons = make_recipe(choices, {"name": output.stem, **data}, base, [*given_data, *others])
    return recipe, dict.fromkeys(diagnosis.suggestions, "suggested by the check of all files") | reasons


def measure_machine(config: Config) -> Machine:
    """The device that trains with this configuration, and its memory."""
    has_timm = find_spec("timm") is not None
    if torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda"):
        return Machine(True, torch.cuda.get_device_properties(0).total_memory, has_timm)
    return Machine(False, get_total_memory() or ASSUMED_MEMORY, has_timm)


def write_report(folder: Path, report: CheckReport) -> list[Path]:
    """Write check.json and check.html, and return their paths."""
    content, page = folder / "check.json", folder / "check.html"
    with atomic_write(content) as temporary:
        temporary.write_text(json.dumps(report_to_json(report), indent=1) + "\n", encoding="utf-8")
    write_check_page(page, report)
    return [content, page]


def report_to_json(report: CheckReport) -> dict[str, Any]:
    """The content of check.json."""
    diagnosis = report.diagnosis
    return {
        "verdict": diagnosis.verdict,
        "notices": [notice._asdict() for notice in diagnosis.notices],
        "splits": [split_to_json(split) for split in diagnosis.splits],
        "classes": [row._asdict() for row in diagnosis.classes],
        "class_weights": diagnosis.class_weights,
        "plan": report.plan._asdict() if report.plan else None,
        "suggestions": diagnosis.suggestions,
        "command": report.command,
    }


def split_to_json(split: SplitSummary) -> dict[str, Any]:
    """The entry of a split in check.json."""
    spreads = {name: getattr(split, name)._asdict() for name in ("heights", "widths", "aspects")}
    return split._asdict() | spreads


# ---- console


def print_report(report: CheckReport, files: Sequence[Path]) -> None:
    """Print the tables, the notices and the verdict."""
    diagnosis, console = report.diagnosis, Console(soft_wrap=True, highlight=False)
    console.print(render_splits(diagnosis.splits))
    if diagnosis.classes:
        console.print(render_classes(diagnosis))
    if report.plan:
        console.print(Text(escape_lines(report.plan.describe())))
    for notice in diagnosis.notices:
        style = {"error": "bold red", "warning": "yellow"}.get(notice.level, "")
        console.print(Text(f"{notice.level}: ", style), Text(escape_lines(notice.text)), sep="")
    console.print(Text(f"\n{escape_lines(diagnosis.verdict)}", "bold"))
    console.print(Text(escape_lines(f"written to {', '.join(str(relative_to_cwd(file)) for file in files)}")))


def render_splits(splits: Sequence[SplitSummary]) -> Table:
    """A table with one row for each split."""
    table = Table()
    for name in ("split", "pairs", "wrong", "height", "width", "images", "masks", "ids", "ignored"):
        table.add_column(name, justify="right" if name in ("pairs", "wrong", "ignored") else "left")
    for split in splits:
        ids = format_ranges(list(split.ids))
        row = [
            split.name,
            str(split.pairs),
            str(split.wrong),
            format_spread(split.heights),
            format_spread(split.widths),
        ]
        row += [", ".join(split.image_kinds), ", ".join(split.mask_kinds), ids, format_share(split.ignored)]
        table.add_row(*(Text(escape_unprintable(text)) for text in row))
    return table


def render_classes(diagnosis: Diagnosis) -> Table:
    """A table of the classes; of many, the most frequent and the rarest."""
    names = [split.name for split in diagnosis.splits]
    table = Table("class", *(f"{name}: pixels, images" for name in names), "weight")
    rows = sorted(diagnosis.classes, key=lambda row: -row.share)
    listed = rows if len(rows) <= MAX_CLASS_ROWS else rows[: MAX_CLASS_ROWS // 2] + rows[-MAX_CLASS_ROWS // 2 :]
    totals = {name: sum(row.pixels[name] for row in rows) or 1 for name in names}
    for row in listed:
        counts = [f"{format_share(row.pixels[name] / totals[name])}, {row.images[name]}" for name in names]
        table.add_row(*(Text(escape_unprintable(text)) for text in (row.name, *counts, f"{row.weight:g}")))
    if len(listed) < len(rows):
        table.caption = f"the most frequent and the rarest of {len(rows)} classes; all are in check.json"
    return table


def format_spread(spread: Spread) -> str:
    """Smallest, median and largest value."""
    low, median, high = spread
    return f"{low:g}" if low == high else f"{low:g} .. {median:g} .. {high:g}"

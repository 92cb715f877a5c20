"""Keys that are `auto`: what is chosen, that it is kept, and that nothing else changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK, run_here
from helpers.in_process import SHORT_RUN, assert_equal, configured, prepare_run
from semseg import build
from semseg.config.schema import Config
from semseg.data.sources import DataSource
from semseg.errors import ConfigError, OutOfMemoryError, SemsegError
from semseg.modes import automatic
from semseg.modes.automatic import (
    CHOICES_FILE,
    Chooser,
    choose_automatic,
    choose_rate,
    find_automatic,
    search_batch_size,
    share_choices,
    write_choices,
)
from semseg.nets.depthwise import fraction_of_depthwise, is_faster_in_channels_last
from semseg.nets.registry import ENCODERS, build_segmenter
from semseg.system import processors
from semseg.training.callbacks import waiting
from semseg.training.callbacks.waiting import RecordWaiting, Waiting, WaitingRecord

AUTOMATIC = ["data.batch_size=auto", "data.num_workers=auto", "model.channels_last=auto", "optim.lr=auto"]
WORDS = [*(word for word in TINY if "batch_size" not in word and "num_workers" not in word), *TINY_NETWORK, *AUTOMATIC]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, constructor in TINY_ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, constructor)


def config_of(root: Path, tmp_path: Path, *words: str) -> Config:
    return configured(*SHORT_RUN, f"data.root={root}", f"run_dir={tmp_path}", *words)


# ---- values


def test_values_beside_auto_have_the_type_of_their_field() -> None:
    config = configured("data.batch_size='3'", "optim.lr=1", "data.num_workers=null", "model.channels_last=1")
    assert (config.data.batch_size, config.optim.lr, config.data.num_workers) == (3, 1.0, None)
    assert isinstance(config.optim.lr, float) and config.model.channels_last is True


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.batch_size=many", "data.batch_size=many: must be a whole number, or auto."),
        ("data.batch_size=2.5", "data.batch_size=2.5: must be a whole number, or auto."),
        ("data.batch_size=null", "data.batch_size=None: must be a whole number, or auto."),
        ("data.batch_size=0", "data.batch_size=0: must be at least 1."),
        ("optim.lr=0", "optim.lr=0.0: must be above 0."),
        ("model.channels_last=auto2", "model.channels_last=auto2: must be true or false, or auto."),
    ],
)
def test_other_values_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(word)
    assert message in str(caught.value)


def test_a_mode_that_needs_a_batch_size_and_chooses_none_says_so() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=auto: is chosen for mode=train .* mode=check"):
        configured("mode=check", "data.batch_size=auto")


# ---- the batch size


@pytest.mark.parametrize("per_image", [1, 7, 90])
@pytest.mark.parametrize("most", [1, 2, 24, 256])
def test_the_largest_batch_that_fits_is_found_in_a_few_tries(per_image: int, most: int) -> None:
    tried: list[int] = []

    def measure(count: int) -> int | None:
        tried.append(count)
        peak = 100 + per_image * count
        return peak if peak <= 1000 else None  # the device has 1000 bytes, of which 900 may be used

    found, slope = search_batch_size(measure, budget=900, most=most)
    best = max(1, min(800 // per_image, most))
    assert found <= best and best - found <= best // 16
    assert len(tried) <= 7 and found in tried  # what was chosen has been run
    assert most == 1 or slope == per_image


@pytest.mark.parametrize("capacity", [1, 2, 3, 20, 100])
def test_a_lack_of_memory_that_the_budget_does_not_show_takes_few_tries(capacity: int) -> None:
    tried: list[int] = []

    def measure(count: int) -> int | None:
        tried.append(count)
        return count if count <= capacity else None

    found, _ = search_batch_size(measure, budget=10**9, most=256)
    assert found <= capacity and capacity - found <= capacity // 16
    assert len(tried) <= 11


def test_peaks_that_grow_faster_than_the_batch_are_not_trusted() -> None:
    found, _ = search_batch_size(lambda count: count * count, budget=900, most=256)
    assert 28 <= found <= 30


def test_the_batch_size_of_a_cpu_follows_the_free_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, tmp_path, "data.batch_size=auto", "data.make.num_train=4")
    monkeypatch.setattr(automatic, "MIN_SUB_BATCHES", 1)
    sizes = []
    for free in (2**17, 2**20, 2**40):
        monkeypatch.setattr(automatic, "get_free_memory", lambda free=free: free)
        sizes.append(choose_automatic(config, [], DataSource(config.data))[0].data.batch_size)
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 4  # all images of the data set, and no more
    double = replace(config, trainer=replace(config.trainer, precision="64-true"))
    monkeypatch.setattr(automatic, "get_free_memory", lambda: 2**20)
    assert choose_automatic(double, [], DataSource(double.data))[0].data.batch_size < sizes[1]


def test_a_pass_over_the_images_keeps_several_steps(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path, "data.batch_size=auto")
    settled, (cache, choice) = choose_automatic(config, [], DataSource(config.data))
    assert settled.data.batch_size == 1 and "4 sub-batches a pass over 4 images" in str(choice)
    assert cache.key == "data.label_cache"


@pytest.mark.parametrize("runs_out_above", [100, 3])
def test_the_probe_of_a_gpu_runs_sub_batches_of_the_network_itself(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_out_above: int
) -> None:
    config = config_of(root, tmp_path, "data.batch_size=auto", "ema.decay=0.9", "optim=adamw", "trainer.devices=2")
    chooser, sizes = Chooser(config, [], DataSource(config.data)), []
    run_once = automatic.run_without_trace

    def run_and_count(module: Any, batch: Any) -> None:
        sizes.append(len(batch.image))
        if sizes[-1] > runs_out_above:
            raise torch.OutOfMemoryError("out of memory")
        run_once(module, batch)

    monkeypatch.setattr(automatic, "run_without_trace", run_and_count)
    monkeypatch.setattr(automatic, "choose_device", lambda settings: torch.device("cpu"))
    for name, fake in {
        "mem_get_info": lambda device: (5000, 9000), "max_memory_allocated": lambda device: 1000 * sizes[-1],
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    found = chooser.fit_gpu(chooser.make_largest_image(), most=8)
    assert found.batch_size == min(4, runs_out_above) and found.budget == 4500 and found.bytes_per_image == 1000
    assert found.batch_size in sizes
    runs_out_above = 0
    with pytest.raises(OutOfMemoryError, match=r"out of memory on a sub-batch of 1 images of"):
        chooser.fit_gpu(chooser.make_largest_image(), most=8)


# ---- the learning rate


@pytest.mark.parametrize(
    ("words", "world_size", "rate"),
    [
        (["data.batch_size=2"], 8, 0.02),  # the published run
        (["data.batch_size=2"], 1, 0.0025),
        (["data.batch_size=4", "trainer.accumulate_grad_batches=3"], 2, 0.03),
        (["optim=adamw", "data.batch_size=4"], 1, 0.5e-4),
        (["optim=adamw", "optim.lr_images=1", "data.batch_size=4"], 1, 2e-4),
        (["experiment=finetune_vit", "data.batch_size=4"], 1, 1e-4 * 0.5**0.5),  # 4 x 2 accumulated, for 16
    ],
)
@pytest.mark.slow
def test_the_rate_of_the_recipe_is_scaled_to_the_images_of_a_step(
    words: list[str], world_size: int, rate: float
) -> None:
    overrides = [*words, "optim.lr=auto"]
    choice = choose_rate(configured(*overrides), overrides, world_size)
    assert choice.value == pytest.approx(rate, rel=1e-12)


def test_parts_are_scaled_with_it_unless_the_command_line_sets_them() -> None:
    words = ["experiment=finetune", "data.batch_size=4", "optim.lr=auto", "optim.lr_decoder=0.1"]
    values = choose_rate(configured(*words), words, 1).values
    assert values == pytest.approx({"optim.lr": 0.005, "optim.lr_encoder": 0.0005})
    assert "linear for sgd" in choose_rate(configured(*words), words, 1).reason


# ---- workers


def test_workers_are_added_for_the_waiting_of_the_run_before(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(waiting, "NUM_WARM_UP", 1)
    monkeypatch.setattr(waiting, "NUM_TIMED", 2)
    monkeypatch.setattr(processors, "count_processors", lambda: 6)
    for module in (automatic, build):
        monkeypatch.setattr(module, "count_processors", lambda: 6)
    words = ["data.num_workers=auto", f"download.cache={tmp_path / 'cache'}"]
    config = configured(*SHORT_RUN, f"data.root={root}", f"run_dir={tmp_path / 'run'}", *words)

    def choose() -> tuple[int, str]:
        settled, choices = choose_automatic(config, [], DataSource(config.data))
        return settled.data.num_workers, str(choices[-1])

    assert choose() == (4, "data.num_workers=4 (6 processors a device; no run before was measured)")
    run = prepare_run(root, tmp_path / "run", words[1], "data.num_workers=1")
    run.fit()
    record = build.locate_waiting_record(config, root)
    found = record.read()
    assert found is not None and found.num_workers == 1 and 0 <= found.fraction <= 1
    record.write(Waiting(2, 0.5))
    assert choose()[0] == 4
    record.write(Waiting(4, 0.5))
    assert choose() == (6, "data.num_workers=6 (6 processors a device; the run before waited 50% of its time with 4)")
    record.write(Waiting(3, 0.01))
    assert choose()[0] == 3
    record.path.write_text(json.dumps({record.key: {"num_workers": -1, "fraction": "x"}}))
    assert choose()[0] == 4  # a damaged record counts as none


class TimedRun:
    """Steps of two seconds: one of waiting for the images, one of computing them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, num_warm_up: int) -> None:
        clock = iter(range(100))
        monkeypatch.setattr(waiting.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(waiting, "NUM_WARM_UP", num_warm_up)
        monkeypatch.setattr(waiting, "NUM_TIMED", 2)
        self.record = WaitingRecord(folder, folder, {})
        self.callback = RecordWaiting(self.record)
        self.trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(num_train_workers=1))
        self.module: Any = SimpleNamespace(device=torch.device("cpu"))

    def take_step(self, *, saves: bool) -> None:
        batch: Any = None
        self.callback.on_train_batch_start(self.trainer, self.module, batch, 0)
        self.callback.on_train_batch_end(self.trainer, self.module, None, batch, 0)
        if saves:
            self.callback.on_save_checkpoint(self.trainer, self.module, {})


def test_a_checkpoint_that_is_written_is_not_waiting_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TimedRun(tmp_path, monkeypatch, num_warm_up=1)
    for number in range(3):
        run.take_step(saves=number == 1)
    assert run.record.read() == Waiting(1, 1 / 3)  # of the second step


def test_the_first_images_of_an_epoch_are_waited_for_although_a_checkpoint_was_written_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TimedRun(tmp_path, monkeypatch, num_warm_up=0)
    for _ in range(2):  # epochs of one step
        run.callback.on_train_epoch_start(run.trainer, run.module)
        run.take_step(saves=True)
    assert run.record.read() == Waiting(1, 0.5)


# ---- the layout


def test_the_layout_follows_the_kind_of_network_and_the_device() -> None:
    with torch.device("meta"):
        mobile, plain = (build_segmenter(name, "c1", 5, {}, {}) for name in ("mobilenetv2", "resnet18"))
    assert fraction_of_depthwise(plain) == 0 and 0.8 < fraction_of_depthwise(mobile) < 1
    faster = {
        (name, device, precision): is_faster_in_channels_last(net, device, precision)
        for name, net in (("mobile", mobile), ("plain", plain))
        for device, precision in (("cpu", "32-true"), ("gpu", "bf16-mixed"), ("gpu", "32-true"))
    }
    assert [key for key, value in faster.items() if value] == [
        ("mobile", "cpu", "32-true"), ("mobile", "gpu", "bf16-mixed"), ("plain", "gpu", "bf16-mixed"),
    ]  # fmt: skip


# ---- whole runs


def read_chosen(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data, model = config["data"], config["model"]
    return {
        "data.batch_size": data["batch_size"], "data.num_workers": data["num_workers"],
        "model.channels_last": model["channels_last"], "optim.lr": config["optim"]["lr"],
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_prints_and_keeps_what_it_chose_and_resumes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, "data.make.num_train=8", "data.num_workers=0"]
    printed = run_here(tmp_path, *words, "run_dir=run")
    chosen = read_chosen(tmp_path / "run")
    assert (chosen["data.batch_size"], chosen["optim.lr"]) == (2, 0.0025)
    for key in ("data.batch_size=2 (", "model.channels_last=", "optim.lr=0.0025 (0.02 for 16 images a step"):
        assert key in printed
    content = json.loads((tmp_path / "run" / CHOICES_FILE).read_text())
    assert "linear for sgd" in {row["key"]: row["reason"] for row in content["choices"]}["optim.lr"]
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["semseg"]["config"]
    assert (saved["data"]["batch_size"], saved["optim"]["lr"]) == (2, 0.0025)
    assert Path(saved["data"]["label_cache"]).is_dir()

    # Now it would choose otherwise. The run does not, and takes the steps of one with these numbers.
    shutil.copytree(tmp_path / "run", tmp_path / "plain")
    monkeypatch.setattr(automatic, "MIN_SUB_BATCHES", 8)
    printed = run_here(tmp_path, *words, "run_dir=run", "trainer.max_epochs=2")
    assert "data.batch_size=2 (as the run was started)" in printed
    assert read_chosen(tmp_path / "run") == chosen
    plain = [word for word in words if not word.endswith("=auto")] + [
        f"{key}={str(value).lower()}" for key, value in chosen.items()
    ]
    run_here(tmp_path, *plain, "run_dir=plain", "trainer.max_epochs=2")
    resumed, expected = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "plain")
    )
    assert_equal(resumed, expected)


@pytest.mark.slow
def test_a_number_other_than_the_chosen_one_is_refused_when_a_run_resumes(tmp_path: Path) -> None:
    words = [*WORDS, "data.num_workers=0", "run_dir=run"]
    run_here(tmp_path, *words)
    printed = run_here(tmp_path, *words, "trainer.max_epochs=2", "data.batch_size=3", code=2)
    assert "data.batch_size: 1 in the checkpoint, 3 now" in printed


# ---- ranks


def test_the_other_ranks_read_what_the_first_one_chose(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, tmp_path, "data.batch_size=auto", "optim.lr=auto", "trainer.devices=2")
    keys, file = find_automatic(config)[1:], tmp_path / CHOICES_FILE
    first = Chooser(config, ["seed=1"], DataSource(config.data))
    choices = share_choices(first, keys, file)
    write_choices(file, [choices[0]._replace(value=7), choices[1]], ["seed=1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(automatic, "WAIT_S", 0.0)
    other = Chooser(config, ["seed=1"], DataSource(config.data))
    share_choices(other, keys, file)
    assert other.config.data.batch_size == 7 == other.source.config.batch_size
    assert other.config.optim.lr == first.config.optim.lr
    with pytest.raises(SemsegError, match=r"the first rank has not chosen data\.batch_size, optim\.lr"):
        share_choices(Chooser(config, ["seed=2"], DataSource(config.data)), keys, file)  # those of another command

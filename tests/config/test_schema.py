from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf, open_dict

from helpers.composition import compose_quickly
from semseg.config.compose import compose_config
from semseg.config.groups import CONFIG_DIR
from semseg.config.hints import find_nearest_key
from semseg.config.schema import Config, config_to_plain, list_keys
from semseg.config.validate import check_config
from semseg.errors import ConfigError

DEFAULT = compose_config([])


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(compose_quickly(overrides))
    return str(caught.value)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def test_the_defaults_are_the_published_ones() -> None:
    config = check_config(DEFAULT)
    assert config.model.name == "resnet50_dilated8_ppm_deepsup"
    assert (config.seed, config.data.batch_size, config.data.steps_per_epoch) == (304, 2, 5000)
    assert config.data.short_edges == [300, 375, 450, 525, 600]
    assert config.data.max_long_edge == 1000
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.02, 0.9, 1e-4)
    assert config.model.deepsup_weight == 0.4


GROUPS = ("model", "model/encoder", "model/decoder", "data", "optim", "schedule", "loss", "syncbn", "trainer", "logger",
          "callbacks")  # fmt: skip
WHOLE_NETWORKS = ("custom", "smp", "transformers")
NUM_ROUNDS = max(len(options(group)) for group in GROUPS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_ROUNDS))
def test_every_option_of_every_group_composes_and_checks(number: int) -> None:
    chosen = {group: options(group)[number % len(options(group))] for group in GROUPS}
    named = {
        "model": "model.library=mine",
        "model/encoder": "model.encoder.name=resnet18",
        "model/decoder": "model.decoder.name=c1",
    }
    if chosen["model"] in WHOLE_NETWORKS:  # they have no encoder and decoder of ours
        chosen = {group: option for group, option in chosen.items() if not group.startswith("model/")}
    names = [override for group, override in named.items() if chosen.get(group) == "custom"]
    check_config(compose_config([*(f"{group}={option}" for group, option in chosen.items()), *names]))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_every_recipe_composes_and_checks(group: str) -> None:
    for option in options(group):
        check_config(compose_config([f"{group}={option}"]))


def test_every_key_of_the_schema_can_be_set_on_the_command_line() -> None:
    for key in list_keys():
        if key.startswith("data.make."):
            continue  # only data sets that are drawn at first use have it
        node = DEFAULT
        for word in key.split("."):
            assert word in node, f"{key} is in semseg/config/schema.py but not in configs/"
            node = node[word]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optim.lr=abc", "optim.lr=abc"),
        ("trainer.devices=0", "trainer.devices=0: must be a count"),
        ("trainer.devices=two", "trainer.devices=two"),
        ("optim.momentum=2", "optim.momentum=2.0: must be at least 0 and below 1"),
        ("optim.lr=0", "must be above 0"),
        ("optim.lr=inf", "must be above 0 and at most 3.4"),
        ("seed=-1", "must be at least 0 and at most 4294967295"),
        ("seed=99999999999999999999", "must be at least 0 and at most 4294967295"),
        ("data.batch_size=0", "data.batch_size=0: must be at least 1"),
        ("mode=evl", "Did you mean mode=eval?"),
        ("mode=eval", "needs ckpt="),
        ("mode=predict ckpt=x", "needs input="),
        ("data.short_edges=[]", "data.short_edges=[]"),
        ("eval.split=vall", "Did you mean eval.split=val?"),
        ("trainer.precision=bf17", "trainer.precision=bf17"),
        ("trainer.strategy=fsdp", "Use trainer.strategy=ddp."),
        ("trainer.strategy=fsdp_cpu_offload", "Use trainer.strategy=ddp."),
        ("trainer.strategy=deepspeed", "Use trainer.strategy=ddp."),
        ("trainer.strategy=ddp_spawn", "Use trainer.strategy=ddp."),
        ("+lrr=3", "There is no key 'lrr'"),
        ("+optim.lrr=3", "Did you mean optim.lr?"),
        ("predict.save=[idz]", "Did you mean predict.save=ids?"),
        ("model.size_divisor=12 model.label_stride=8", "must be a multiple of model.label_stride"),
    ],
)
def test_a_wrong_value_is_one_line(override: str, part: str) -> None:
    message = problem(*override.split(" "))
    assert part in message
    assert "\n" not in message


def test_all_problems_are_reported_at_once() -> None:
    message = problem("optim.lr=-1", "optim.momentum=3")
    assert message.startswith("2 problems")
    assert "optim.lr" in message and "optim.momentum" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "builtins.eval", "pytorch_lightning.callbacks.os.system", "subprocess.run"]
)
def test_a_target_that_is_not_on_the_list_is_refused(target: str) -> None:
    for key in ("callbacks.extra._target_", "logger.csv._target_"):
        composed = DEFAULT.copy()
        with open_dict(composed):
            OmegaConf.update(composed, key, target, force_add=True)
        with pytest.raises(ConfigError, match="not allowed"):
            check_config(composed)


def test_a_typo_inside_a_file_is_caught(tmp_path: Path) -> None:
    composed = type(DEFAULT)({**DEFAULT, "optim": {**DEFAULT.optim, "lerning_rate": 1}})
    with pytest.raises(ConfigError, match="lerning_rate"):
        check_config(composed)


@pytest.mark.slow
def test_a_configuration_survives_the_trip_through_plain_data() -> None:
    config = check_config(compose_config(["data=camvid", "model=upernet50", "trainer.devices=[0,1]"]))
    plain = yaml.safe_load(yaml.safe_dump(config_to_plain(config)))
    assert check_config(DEFAULT.__class__(plain)) == config
    assert isinstance(config, Config)


def test_the_last_part_of_a_key_is_enough_to_find_it() -> None:
    assert find_nearest_key("lr", list_keys()) == "optim.lr"
    assert find_nearest_key("optim.lrr", list_keys()) == "optim.lr"
    assert find_nearest_key("trainer.max_epoch", list_keys()) == "trainer.max_epochs"
    assert find_nearest_key("xyzzy", list_keys()) is None

"""The error about an unknown key names the nearest key, or what replaces it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import pytorch_lightning as pl
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from semseg.config.compose import compose_config
from semseg.config.explain import explain_hydra_error
from semseg.config.groups import list_groups
from semseg.config.hints import KEY_SYNONYMS, REMOVED_KEYS, TRAINER_HINTS, explain_unknown_key
from semseg.config.schema import TrainerConfig, list_keys
from semseg.config.validate import check_config
from semseg.errors import ConfigError
from semseg.training.trainer import OWN_TRAINER_KEYS

pytestmark = pytest.mark.reliability
KEYS = list_keys()
COMPOSED = compose_config([])


def explain_override(override: str) -> str:
    """The error message for one override."""
    with pytest.raises((ConfigError, HydraException)) as caught:
        check_config(compose_config([override]))
    return str(caught.value) if isinstance(caught.value, ConfigError) else explain_hydra_error(caught.value, [override])


def explain_key_of_file(key: str) -> str:
    """The error message for a key that a configuration file holds."""
    composed = COMPOSED.copy()
    with open_dict(composed):
        OmegaConf.update(composed, key, 1, force_add=True)
    with pytest.raises(ConfigError) as caught:
        check_config(composed)
    return str(caught.value)


def double_last_letter(name: str) -> str:
    """`name` with a typo: its last letter twice."""
    return name + name[-1]


def test_i4_a_typo_in_any_key_of_any_section_is_recognised() -> None:
    assert {"bench.steps", "download.cache", "serve.port", "data.make.seed", "loss.terms.dice"} <= set(KEYS)
    for key in KEYS:
        section, dot, last = key.rpartition(".")
        assert f"Did you mean {key}?" in explain_unknown_key(f"{section}{dot}{double_last_letter(last)}", KEYS)
        swapped = f"{section}{dot}{last[0]}{last[2:3]}{last[1]}{last[3:]}"
        if len(last) > 3 and swapped not in KEYS:  # in the same section: model.edcoder may be either of two
            assert f"Did you mean {section}{dot}" in explain_unknown_key(swapped, KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("section", sorted({key.rpartition(".")[0] for key in KEYS} - {""}))
def test_i4_a_typo_in_a_file_is_recognised_in_every_section(section: str) -> None:
    key = max((key for key in KEYS if key.rpartition(".")[0] == section), key=len)
    base = section.replace("data.make", "data").replace("data.archive", "data")  # absent from the default data set
    wrong = f"{section}.{double_last_letter(key.rpartition('.')[2])}"
    message = explain_key_of_file(wrong) if base == section else explain_unknown_key(wrong, KEYS)
    assert f"Did you mean {key}?" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("bench.stpes=3", "Did you mean bench.steps?"),
        ("dta=camvid", "Did you mean data?"),
        ("model/encoder=resnte50", "Did you mean model/encoder=resnet50?"),
        ("model.encoder=resnet18", "is a section, not a value. Choose a network by model/encoder=<name>"),
        ("ema=0.99", "ema=0.99: is a section, not a value. Its keys: ema.decay, ema.start_step."),
        ("optim=null", "optim=null: not known.\nValid: adamw, sgd."),
        ("~trainer.max_epoch", "Did you mean trainer.max_epochs?"),
        ("data.make.num_train=3", "There is no key 'data.make.num_train', because data.make is null."),
        ("logger.wandb.project=x", "There is no key 'logger.wandb.project' without logger=wandb."),
        ("trainer.val_check_interval=0.5", "Set trainer.check_val_every_n_epoch=<epochs>, and data.steps_per_epoch"),
    ],
)  # fmt: skip
def test_i4_the_error_names_the_nearest_key_or_option(override: str, part: str) -> None:
    assert part in explain_override(override)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "optim.lr"), ("trainer.lr", "optim.lr"), ("optimizer.learning_rate", "optim.lr"),
        ("trainer.num_workers", "data.num_workers"), ("batch_size", "data.batch_size"), ("devices", "trainer.devices"),
        ("epochs", "trainer.max_epochs"), ("data.epochs", "trainer.max_epochs"), ("max_epochs", "trainer.max_epochs"),
        ("trainr.max_epochs", "trainer.max_epochs"), ("num_classes", "data.num_classes"), ("optimizer", "optim"),
        ("model.backbone", "model/encoder"), ("encoder", "model/encoder"), ("decoder", "model/decoder"),
    ],
)  # fmt: skip
def test_i4_a_key_of_another_section_or_program_is_recognised(key: str, nearest: str) -> None:
    assert explain_unknown_key(key, KEYS + list_groups()) == f"There is no key {key!r}. Did you mean {nearest}?"


def test_i3_every_option_of_lightnings_trainer_is_accepted_or_explained() -> None:
    accepted = {item.name for item in fields(TrainerConfig)} - set(OWN_TRAINER_KEYS)
    options = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert accepted <= options, "an accepted key is not an option of Lightning any more"
    assert options - accepted - set(TRAINER_HINTS) == set()
    for option in TRAINER_HINTS:
        assert (
            explain_unknown_key(f"trainer.{option}", KEYS)
            == f"There is no key 'trainer.{option}'. {TRAINER_HINTS[option]}"
        )
        assert explain_unknown_key(option, KEYS) == f"There is no key {option!r}. {TRAINER_HINTS[option]}"
    assert not accepted & set(TRAINER_HINTS)


@pytest.mark.slow
@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_i3_the_error_about_a_removed_key_names_its_replacement(key: str) -> None:
    assert key not in KEYS
    for override in (f"{key}=x", f"+{key}=x", f"++{key}=x"):
        assert explain_override(override) == f"There is no key {key!r} any more. {REMOVED_KEYS[key]}"
    assert REMOVED_KEYS[key] in explain_key_of_file(key)


def test_i3_explanations_name_keys_that_exist() -> None:
    known = {*KEYS, *list_groups(), "model.encoder.weights"}
    assert set(KEY_SYNONYMS.values()) <= known
    assert not set(KEY_SYNONYMS) & known
    for text in [*TRAINER_HINTS.values(), *REMOVED_KEYS.values()]:
        for word in text.replace("=", " ").replace(",", " ").replace(":", " ").replace(";", " ").split():
            is_key = "." in word.strip(".") and not {*"<>/"} & {*word} and word != "0.999"
            assert not is_key or word.strip(".") in known, f"{word} in {text!r}"

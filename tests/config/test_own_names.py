"""Names that programs add to our tables are keys like ours; everything else stays refused."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf

from semseg.config.load import load_config
from semseg.config.overrides import parse_overrides
from semseg.config.schema import config_to_plain
from semseg.config.tables import list_own_keys, list_own_names
from semseg.config.validate import check_config
from semseg.data.augment import AUGMENTATIONS
from semseg.errors import ConfigError
from semseg.training.losses import LOSSES
from semseg.training.trainer import CALLBACKS, LOGGERS

WORDS = [
    "loss.terms.mine={factor: 0.5, gamma: 2}",
    "augment.noise=3",
    "callbacks.watch={every: 4}",
    "logger.web.port=1",
]


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    with (
        patch.dict(LOSSES, mine=print),
        patch.dict(AUGMENTATIONS, noise=print),
        patch.dict(CALLBACKS, watch=print),
        patch.dict(LOGGERS, web=print),
    ):
        yield


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(words))
    return str(caught.value)


def test_the_names_that_programs_add_are_keys_and_ours_stay_as_they_were() -> None:
    assert set(list_own_keys()) == {"loss.terms.mine", "augment.noise", "callbacks.watch", "logger.web"}
    assert parse_overrides(["loss.terms.mine=1", "loss.terms.dice=1", "loss.terms.mne=1"]) == [
        "++loss.terms.mine=1",
        "loss.terms.dice=1",
        "loss.terms.mne=1",
    ]


@pytest.mark.slow
def test_their_values_are_beside_ours_in_files_and_survive_the_trip() -> None:
    config, _ = load_config(WORDS)
    plain = config_to_plain(config)
    assert (
        plain["loss"]["terms"] | {"cross_entropy": 1.0, "mine": {"factor": 0.5, "gamma": 2}} == plain["loss"]["terms"]
    )
    assert plain["augment"]["noise"] == 3 and "own" not in plain["augment"]
    assert plain["callbacks"] == {"watch": {"every": 4}} and plain["logger"]["web"] == {"port": 1}
    assert config.loss.terms.factors["mine"] == 0.5 and config.augment.is_on
    assert check_config(OmegaConf.create(plain)) == config


@pytest.mark.slow
def test_a_saved_configuration_may_name_what_this_program_lacks_and_a_command_may_not() -> None:
    monitored = ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/miou"]
    plain = config_to_plain(load_config([*WORDS, *monitored])[0])
    plain["callbacks"]["early_stopping"]["monitor"] = "val/kappa"
    LOSSES.pop("mine"), AUGMENTATIONS.clear(), CALLBACKS.clear(), LOGGERS.clear()  # patch.dict restores them
    saved = check_config(OmegaConf.create(plain), is_saved=True)
    assert saved.loss.terms.own == {"mine": {"factor": 0.5, "gamma": 2}}
    with pytest.raises(ConfigError, match=r"loss\.terms\.mine.*docs/extending\.md"):
        check_config(OmegaConf.create(plain))
    plain["callbacks"]["watch"]["_target_"] = "os.system"
    with pytest.raises(ConfigError, match="not allowed"):  # data from a file never names code
        check_config(OmegaConf.create(plain), is_saved=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("loss.terms.mnie=1", ["loss.terms.mnie", "Did you mean loss.terms.mine?"]),
        ("+loss.terms.mnie=1", ["loss.terms.mnie", "Did you mean loss.terms.mine?"]),
        ("loss.terms.xyzzy=1", ["loss.terms.xyzzy", "docs/extending.md"]),
        ("callbacks.xyzzy.every=1", ["callbacks.xyzzy.every", "docs/extending.md"]),
        ("augment.nois=1", ["Did you mean augment.noise?"]),
        ("loss=mine", ["loss=mine", "loss.terms.mine=1"]),
        ("augment=noise", ["augment.noise=1"]),
        ("callbacks=watch", ["callbacks.watch={}"]),
        ("loss.terms.mine=-1", ["loss.terms.mine=-1"]),
        ("loss.terms.mine=nan", ["loss.terms.mine=nan"]),
        ("loss.terms.mine=often", ["loss.terms.mine=often"]),
        ("loss.terms.mine={factor: a}", ["loss.terms.mine="]),
        ("augment.noise=much", ["augment.noise=much"]),
        ("+callbacks.other.every=3", ["callbacks.other", "docs/extending.md"]),
        ("callbacks.watch._target_=os.system", ["callbacks.watch._target_=os.system", "not allowed"]),
        ("callbacks.watch={x: {_target_: os.system}}", ["callbacks.watch.x._target_"]),
        ("augment.noise={_target_: os.system}", ["augment.noise._target_"]),
        ("loss.terms.mine={_target_: os.system}", ["loss.terms.mine._target_"]),
    ],
)
def test_what_is_wrong_is_refused_with_the_key_and_the_way_out(word: str, parts: list[str]) -> None:
    message = refusal(word)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", ["a b", "", "2d", "own", "müll", "a.b"])
def test_a_name_that_cannot_be_a_key_is_refused(name: str) -> None:
    LOSSES[name] = print  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"loss\.terms"):
        list_own_names("loss.terms")


def test_a_name_that_a_key_of_ours_has_already_is_refused_and_not_ignored() -> None:
    AUGMENTATIONS["blur"] = print  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"augment\.blur already"):
        list_own_names("augment")
    LOSSES["dice"] = print  # pyright: ignore[reportArgumentType]
    assert list_own_names("loss.terms") == ["mine"]  # in the place of ours, and chosen by the same key

"""Every network trains on two ranks, whatever is frozen and whether its auxiliary head counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from distributed.two_steps import Outcome, train_two_steps

from helpers.ranks import launch
from helpers.transformers_networks import save_network
from semseg.config.groups import CONFIG_DIR

pytestmark = [pytest.mark.slow, pytest.mark.reliability]

NEED_A_NAME = ("custom", "smp", "transformers")  # of a network elsewhere; tests/nets/libraries trains those of smp
LARGER = ("_base", "_base_plus", "_large")  # than another ready model of the same layers
MODELS = sorted(
    path.stem
    for path in (CONFIG_DIR / "model").glob("*.yaml")
    if path.stem not in NEED_A_NAME and not path.stem.endswith(LARGER)
)
SUPERVISION = {
    "": [], "head without weight, ": ["model.deepsup_weight=0"], "no head, ": ["model.decoder.deep_supervision=false"],
}  # fmt: skip
PARTS = {
    "all trained": [],
    "frozen encoder": ["model.encoder.frozen=true"],
    "frozen statistics": ["model.freeze_bn=true"],
}
Train = Callable[[Mapping[str, Sequence[str]]], dict[str, Outcome]]

# Kinds of networks, as small as their options allow.
SMALL = {
    "upernet": ["model=upernet50", "model/encoder=resnet18", "model.decoder.width=16"],
    "mobilenet": ["model=mobilenetv2_dilated8_c1_deepsup", "model.decoder.deep_supervision=false"],
    "vit": ["model=upernet_lite_dinov3_vit_small", "model.encoder.name=vit_tiny_patch16_224", "model.decoder.width=16"],
}
FAMILIES_OF_TRANSFORMERS = ("segformer", "eomt")  # the second one has a loss of its own


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train networks on two ranks; returns the outcomes of rank 0, which those of rank 1 equal."""

    def train(cases: Mapping[str, Sequence[str]]) -> dict[str, Outcome]:
        first, second = launch(partial(train_two_steps, cases=cases, folder=str(tmp_path)), 2)
        assert first == second
        return first

    return train


def assert_trained(outcomes: Mapping[str, Outcome]) -> None:
    assert {name: outcome.steps for name, outcome in outcomes.items()} == dict.fromkeys(outcomes, 2)
    assert {name: outcome.without_gradient for name, outcome in outcomes.items() if outcome.without_gradient} == {}
    assert all(outcome.is_wrapped_first and outcome.fills_buckets for outcome in outcomes.values())


def test_d8_every_kind_of_network_trains_on_two_ranks(train: Train, tmp_path: Path) -> None:
    cases = {name: words for name, words in SMALL.items() if name != "vit" or find_spec("timm") is not None}
    if find_spec("transformers") is not None:
        for family in FAMILIES_OF_TRANSFORMERS:
            folder = save_network(family, tmp_path / family)
            cases[family] = ["model=transformers", f"model.name={folder}", "model.encoder.weights=hub"]
    outcomes = train(cases)
    assert_trained(outcomes)
    assert {name: outcome.unused for name, outcome in outcomes.items() if outcome.unused} == {}


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_d8_every_ready_model_trains_on_two_ranks_with_any_part_frozen(train: Train, model: str) -> None:
    supervision = SUPERVISION if model.endswith("_deepsup") else {"": []}
    outcomes = train({
        f"{head}{part}": [f"model={model}", *head_words, *part_words]
        for head, head_words in supervision.items()
        for part, part_words in PARTS.items()
    })  # fmt: skip
    assert_trained(outcomes)
    for name, outcome in outcomes.items():
        is_head_idle = name.startswith("head without weight")
        assert all("_deepsup." in one for one in outcome.unused) and bool(outcome.unused) == is_head_idle

"""The quick composition of tests gives what the real one gives."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from helpers.composition import compose_quickly
from helpers.in_process import SHORT_RUN
from semseg.config.compose import compose_config

VALUES = ["data.root=a b", "seed=3", "optim.lr=1e-3", "data.short_edges=[32]", "+callbacks.x={a: 1}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        SHORT_RUN,
        ["experiment=quickstart", *VALUES],
        ["mode=eval", "ckpt=best", "data=folder", "eval.scales=[1,2]", "data.map={1: 2, 3: null}", "logger={}"],
        ["model=upernet50", "~callbacks.early_stopping", "callbacks=early_stopping", "debug=fast", "trainer=ddp_cpu"],
        ["optim=adamw", "augment=strong", "loss=ohem", "ema.decay=0.9", "~logger"],
    ],
)
def test_quick_compositions_are_equal(words: list[str]) -> None:
    words = [*words, "run_dir=here"]
    for given in (words, [*words, "optim.momentum=0.5"]):
        quick, real = compose_quickly(tuple(given)), compose_config(given)
        assert OmegaConf.to_yaml(quick) == OmegaConf.to_yaml(real)
        assert OmegaConf.is_struct(quick) == OmegaConf.is_struct(real)

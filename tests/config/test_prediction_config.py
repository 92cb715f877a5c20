"""The configuration for predicting from Python has no mode."""

from __future__ import annotations

import pytest

from semseg.config.load import load_prediction_config
from semseg.config.schema import Config
from semseg.config.uses import refuse_unread_keys
from semseg.errors import ConfigError


def test_predicting_needs_no_mode_and_takes_exported_networks() -> None:
    config, overrides = load_prediction_config("a folder/net.onnx", ["predict.scales=[32]", "predict.flip=true"])
    assert (config.ckpt, config.predict.scales, config.mode) == ("a folder/net.onnx", [32], Config().mode)
    assert overrides[0] == 'ckpt="a folder/net.onnx"' and not any(word.startswith("mode") for word in overrides)


@pytest.mark.parametrize(
    ("ckpt", "override", "message"),
    [
        ("net.pt2", "predict.flip=true", r"^ckpt=net\.pt2: cannot be loaded.*Export to \.onnx"),
        ("net.onnx", "model.compile=true", r"^model\.compile=True: an exported network runs as it was exported"),
        (
            "net.ckpt",
            "model.compile=true",
            r"^model\.compile=true: has no effect with mode=predict",
        ),
        ("net.ckpt", "predict.scale=[32]", r"'predict\.scale'. Did you mean predict\.scales\?"),
        ("net.ckpt", "eval.scale=[32]", r"Did you mean eval\.scales\?"),
        ("net.ckpt", "predict.scales=32", "predict.scales=32"),
        ("net.ckpt", "mode=eval", r"^mode=eval: does not change predictions\. .* data, .* predict"),
        ("net.ckpt", "optim.lr=1", r"^optim\.lr=1: does not change predictions"),
        ("net.ckpt", "input=a.jpg", r"^input=a\.jpg: does not"),
    ],
)
def test_wrong_overrides_are_explained_without_a_mode(ckpt: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_prediction_config(ckpt, [override])
    assert "mode=serve" not in str(caught.value)


def test_windows_of_prediction_are_batched_by_the_key_of_evaluation() -> None:
    refuse_unread_keys("predict", ["ckpt=a.ckpt", "input=a", "eval.batch_size=4"])
    refuse_unread_keys("serve", ["ckpt=a.ckpt", "eval.batch_size=4"])
    with pytest.raises(ConfigError, match=r"eval\.bootstrap=9: has no effect with mode=predict"):
        refuse_unread_keys("predict", ["ckpt=a.ckpt", "input=a", "eval.bootstrap=9"])

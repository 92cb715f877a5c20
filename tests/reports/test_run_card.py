from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from semseg.config.origin import WeightsOrigin
from semseg.config.schema import Config, LossConfig, config_to_plain
from semseg.data.geometry import Size
from semseg.data.records import Record
from semseg.reports.run_card import (
    NO_CHECKOUT,
    build_run_card,
    compute_data_fingerprint,
    describe_git_state,
    mask_argument,
    mask_secrets,
)


def test_secrets_are_masked_at_any_depth() -> None:
    plain = {"logger": {"w": {"API_Key": "abc", "url": "https://me:pw@host/x"}}, "list": [{"token": 1}], "lr": 0.1}
    assert mask_secrets(plain) == {
        "logger": {"w": {"API_Key": "***", "url": "https://***@host/x"}},
        "list": [{"token": "***"}],
        "lr": 0.1,
    }
    assert mask_argument("logger={w:{api_key:abc,n:1}}") == "logger={w: {api_key: ***,n:1}}"
    assert mask_argument("a={password: 'x, y', hf_token: {b: c}, n: 1}") == "a={password: ***, hf_token: ***"
    assert mask_argument("ckpt=epoch=3.ckpt") == "ckpt=epoch=3.ckpt"


def test_names_that_only_contain_the_word_key_are_no_secrets() -> None:
    plain = {"class_map": {"keyboard": "screen", "turkey": "bird"}, "options": {"num_key_value_heads": 4}}
    assert mask_secrets(plain) == plain
    argument = "data.mix=[{root: more, class_map: {keyboard: screen, tv: screen}}]"
    assert mask_argument(argument) == argument


def test_the_card_holds_a_command_that_can_be_pasted_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "do-not-store")
    config = Config(mode="eval", ckpt="my run/best.ckpt", loss=LossConfig(), logger={"w": {"password": "hunter2"}})
    command = ["python", "run.py", "ckpt=my run/best.ckpt", "logger.w.password=hunter2"]
    card = build_run_card(config_to_plain(config), command, "cpu")
    assert card.command == "python run.py 'ckpt=my run/best.ckpt' 'logger.w.password=***'"
    assert "ckpt: my run/best.ckpt" in card.config
    assert "hunter2" not in str(card) and "do-not-store" not in str(card)
    assert card.versions["torch"] == torch.__version__.partition("+")[0] or card.versions["torch"] == torch.__version__


def test_the_card_names_the_initial_weights_of_every_network_once() -> None:
    first, second = WeightsOrigin("a/b", "apache-2.0"), WeightsOrigin("c/d", "other")
    card = build_run_card({}, [], "cpu", origins=[first, None, second, first])
    assert card.weights == f"{first}; {second}"
    assert build_run_card({}, [], "cpu", origins=[None]).weights == ""


def test_the_git_state_names_commit_and_changes_of_the_tracking_checkout_only(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    assert describe_git_state(file) == NO_CHECKOUT
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "a.py"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}, nothing changed since", describe_git_state(file))
    file.write_text("x = 2\n")
    assert describe_git_state(file).endswith(", files changed since: 1")
    (tmp_path / "metrics.csv").write_text("")  # untracked files, such as data and run folders, do not count
    assert describe_git_state(file).endswith(", files changed since: 1")
    installed = tmp_path / "b.py"
    installed.write_text("")
    assert describe_git_state(installed) == NO_CHECKOUT


def test_the_fingerprint_depends_on_names_and_sizes_but_not_on_root_and_order(tmp_path: Path) -> None:
    def fingerprint(root: Path, names: str, size: int) -> str:
        root.mkdir()
        for name in names:
            (root / name).write_bytes(b"x" * size)
        records = [Record(str(root / name), None, Size(1, 1), "") for name in names]
        found = compute_data_fingerprint(records, root)
        assert found.images == len(names)
        return found.sha256

    base = fingerprint(tmp_path / "a", "xyz", 3)
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert fingerprint(tmp_path / "b", "zxy", 3) == base
    assert fingerprint(tmp_path / "c", "xyz", 4) != base
    assert fingerprint(tmp_path / "d", "xyw", 3) != base

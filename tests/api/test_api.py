"""Training, evaluation, prediction and checks as calls: the results, and what they leave of the process."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import semseg
from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK, run_here
from semseg.api import isolation, results
from semseg.api.keywords import list_words
from semseg.api.results import TrainingRun
from semseg.cli.main import compose_run
from semseg.config.groups import CONFIG_DIR
from semseg.config.overrides import parse_overrides
from semseg.config.schema import Config
from semseg.errors import ArgumentError, ConfigError, DataError, SemsegError
from semseg.nets.registry import ENCODERS
from semseg.storage.run_results import RunResult, write_result
from semseg.system.text import escape_csv_cell

QUIET = {"quiet": True, "trainer__enable_progress_bar": False}
RUN = [*TINY, *TINY_NETWORK, "after_training=[eval]"]


@pytest.fixture(autouse=True)
def tiny_encoder() -> Iterator[None]:
    with patch.dict(ENCODERS, TINY_ENCODERS):
        yield


@pytest.fixture
def default_handlers(signals_restored: None) -> None:
    """Ctrl-C as in a program that does nothing about it; command lines of other tests have replaced its handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """A network after two steps on drawn scenes."""
    folder = tmp_path_factory.mktemp("api")
    with patch.dict(ENCODERS, TINY_ENCODERS):
        return semseg.train(*RUN, **QUIET, data__root=folder / "scenes", run_dir=folder / "run")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"data": "folder", "data__root": "my photos"}, ["data=folder", "data.root=my photos"]),
        ({"model__encoder": "resnet18"}, ["model/encoder=resnet18"]),
        ({"model": {"encoder": {"frozen": True}}}, ["model.encoder.frozen=true"]),
        ({"optim": {"name": "adamw", "lr": np.float32(0.5)}}, ['optim.name="adamw"', "optim.lr=0.5"]),
        ({"data": {"map": {0: 0, 255: None}}}, ["data.map={0:0,255:null}"]),
        ({"ckpt": [Path("a.ckpt"), "b.ckpt"]}, ['ckpt=["a.ckpt","b.ckpt"]']),
        ({"eval__scales": (300, 450), "seed": np.int64(3)}, ["eval.scales=[300,450]", "seed=3"]),
        ({"predict__save": ["ids"], "eval__flip": np.True_}, ['predict.save=["ids"]', "eval.flip=true"]),
        ({"input": "[0-9]*.jpg", "run_dir": "[exp1]"}, ['input="[0-9]*.jpg"', 'run_dir="[exp1]"']),
        ({"ckpt": "[a.ckpt,b.ckpt]"}, ["ckpt=[a.ckpt,b.ckpt]"]),
        ({"model__options": {"decoder_use_norm": "batchnorm"}}, ['model.options.decoder_use_norm="batchnorm"']),
        ({"trainer__devices": "0,2", "data__group": "(.*)_[0-9]+"}, ["trainer.devices=0,2", "data.group=(.*)_[0-9]+"]),
    ],
)
def test_keywords_are_words_of_the_command_line(keywords: dict[str, Any], words: list[str]) -> None:
    assert list_words(["verbose=true"], keywords) == ["verbose=true", *words]


def test_mirrors_may_have_whole_addresses() -> None:
    mirrors = {"http://a.org:8000/": ["https://b.org/x"]}
    words = parse_overrides(list_words(["data=folder", "data.num_classes=2"], {"download__mirrors": mirrors}))
    assert compose_run(words)[1].download.mirrors == mirrors


def test_a_name_that_no_file_can_have_is_a_missing_file() -> None:
    with pytest.raises(SemsegError, match="there is no such file"):
        semseg.load("a" * 300)


def test_arguments_that_no_key_can_have_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"optim\.lr=<object"):
        semseg.train(optim__lr=object())
    with pytest.raises(ArgumentError, match="'-m'"):
        semseg.train("-m")
    with pytest.raises(ConfigError, match=r"optim\.rate"):
        semseg.train(optim__rate=0.1)
    with pytest.raises(ConfigError, match="no key 'exp'"):
        semseg.train(exp="own_data")


@pytest.mark.slow
def test_a_run_has_its_score_checkpoints_values_and_page(trained: TrainingRun) -> None:
    assert trained.score is not None and 0 <= trained.score <= 1
    assert trained.ckpt == trained.folder / "checkpoints" / "best.ckpt"
    assert trained.last_ckpt == trained.folder / "checkpoints" / "last.ckpt"
    with patch.object(results, "find_spec", lambda name: None):
        history = trained.history
    assert isinstance(history, list) and any("val/miou" in row for row in history) and "step" in history[0]
    page = trained._repr_html_()
    assert page is not None and page.startswith("<iframe srcdoc=") and "&lt;" in page
    assert trained.evaluation is not None and trained.evaluation.mean_iou is not None


def test_the_evaluation_of_a_run_is_the_one_that_followed_its_training(tmp_path: Path) -> None:
    for name in ("eval", "eval-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text("{}")
    run = TrainingRun(tmp_path, 0.5)
    assert run.evaluation is None
    os.utime(tmp_path / "eval" / "metrics.json", (1, 1))
    write_result(tmp_path, RunResult(0.5))
    assert run.evaluation is None  # a command of its own has evaluated the run, before
    (tmp_path / "eval" / "metrics.json").write_text("{}")
    assert run.evaluation is not None and run.evaluation.folder == tmp_path / "eval"  # as of earlier versions
    write_result(tmp_path, RunResult(0.5, follow_ups=(("eval", "eval-2"),)))
    assert run.evaluation is not None and run.evaluation.folder == tmp_path / "eval-2"


def test_names_in_tables_stay_text_and_counts_are_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "tabulate_rows", list)
    path = tmp_path / "label_errors.csv"
    cells = ["1", escape_csv_cell("-2.jpg"), "007", "nan", "0.5", ""]
    path.write_text(f"rank,file,label,predicted,score,margin\n{','.join(cells)}\n")
    (row,) = results.read_table(path)
    assert row == {"rank": 1, "file": "-2.jpg", "label": "007", "predicted": "nan", "score": 0.5, "margin": None}
    assert type(row["rank"]) is int


@pytest.mark.slow
def test_tables_are_data_frames_where_pandas_is_installed(trained: TrainingRun) -> None:
    pd = pytest.importorskip("pandas")
    history, evaluation = trained.history, trained.evaluation
    assert evaluation is not None
    assert isinstance(history, pd.DataFrame) and history["val/miou"].notna().any()
    assert list(evaluation.classes["name"]) == [row["name"] for row in evaluation.scores["classes"]]
    assert (
        pd.api.types.is_integer_dtype(evaluation.images["height"])
        and len(evaluation.images) == evaluation.scores["images"]
    )


@pytest.mark.slow
def test_a_network_is_evaluated_and_predicts(trained: TrainingRun, tmp_path: Path) -> None:
    assert trained.ckpt is not None
    found = semseg.evaluate(
        trained.folder, **QUIET, run_dir=tmp_path / "eval", eval__bootstrap=0, eval__label_errors=True
    )
    assert trained.evaluation is not None and found.mean_iou == trained.evaluation.mean_iou
    assert len(found.label_errors) == len((tmp_path / "eval" / "label_errors.csv").read_text().splitlines()) - 1
    assert len(trained.evaluation.label_errors) == 0
    assert found.confusion.shape == (found.confusion.shape[0],) * 2 and found.page == tmp_path / "eval" / "report.html"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    predicted = semseg.predict(trained.ckpt, tmp_path / "a.png", **QUIET, run_dir=tmp_path / "predict")
    assert [path.name for path in predicted.files] == ["a_ids.png", "a_panel.png"]
    shown = predicted._repr_html_()
    assert shown is not None and shown.startswith('<img src="data:image/png;base64,') and 'alt="a_panel.png"' in shown


@pytest.mark.slow
def test_load_takes_keywords_and_a_result_says_where_it_cannot_be_written(trained: TrainingRun, tmp_path: Path) -> None:
    assert trained.ckpt is not None
    net = semseg.load(trained.ckpt, device="cpu", predict__scales=[48], predict={"flip": True})
    assert net.settings.scales == [48] and net.settings.flip
    with pytest.raises(ConfigError, match="does not change predictions"):
        semseg.load(trained.ckpt, optim__lr=0.1)
    result = net.predict(np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        result.save(tmp_path / "file" / "folder")


def test_a_full_disk_is_an_error_of_the_package(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("semseg.api.run.run_mode", side_effect=error),
        pytest.raises(SemsegError, match=r"run: cannot be written \(No space left on device\)\. Free some space"),
    ):
        semseg.check(data="folder", run_dir=tmp_path / "run")


@pytest.mark.slow
def test_the_process_is_as_before(trained: TrainingRun, tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    environment, arguments = dict(os.environ), list(sys.argv)
    handlers = {number: signal.getsignal(number) for number in isolation.STOP_SIGNALS}
    again = semseg.train(
        *RUN, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path, trainer__deterministic=True
    )
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert dict(os.environ) == environment and sys.argv == arguments
    assert {number: signal.getsignal(number) for number in isolation.STOP_SIGNALS} == handlers
    assert not torch.are_deterministic_algorithms_enabled()
    assert again.score == trained.score  # and the run is the same as the one before it


@pytest.mark.slow
def test_a_call_trains_what_the_command_line_trains(trained: TrainingRun, tmp_path: Path) -> None:
    root = trained.folder.parent / "scenes"
    run_here(tmp_path, *RUN, "quiet=true", f"data.root={root}", f"run_dir={tmp_path / 'run'}", "after_training=[]")
    assert trained.last_ckpt is not None
    ours, theirs = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (trained.last_ckpt, tmp_path / "run" / "checkpoints" / "last.ckpt")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = (trained.folder / ".hydra" / "overrides.yaml").read_text()
    assert "mode=train" in record and "model/encoder=resnet18" in record  # mode=rerun repeats it


@pytest.mark.slow
@pytest.mark.usefixtures("default_handlers")
def test_a_run_that_is_stopped_resumes(trained: TrainingRun, tmp_path: Path) -> None:
    keywords = {
        **QUIET, "data__root": trained.folder.parent / "scenes", "run_dir": tmp_path, "after_training": [],
    }  # fmt: skip
    from semseg.lit_module import SegmentationModule

    original, calls = SegmentationModule.training_step, []

    def interrupt(self: SegmentationModule, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with patch.object(SegmentationModule, "training_step", interrupt), pytest.raises(SemsegError, match="To resume"):
        semseg.train(*RUN, **keywords)
    assert len(calls) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert semseg.train(*RUN, **keywords, resume="auto").score == trained.score


@pytest.mark.slow
@pytest.mark.usefixtures("default_handlers")
def test_a_second_interrupt_is_that_of_the_program(trained: TrainingRun, tmp_path: Path) -> None:
    from semseg.lit_module import SegmentationModule

    def interrupt_twice(self: SegmentationModule, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one is not held back")

    with patch.object(SegmentationModule, "training_step", interrupt_twice), pytest.raises(KeyboardInterrupt):
        semseg.train(*RUN, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_another_thread_can_train(trained: TrainingRun, tmp_path: Path) -> None:
    scores = []

    def train() -> None:
        run = semseg.train(*RUN, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path)
        scores.append(run.score)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert scores == [trained.score]


def test_the_configuration_of_a_program_that_uses_hydra_stays(tmp_path: Path) -> None:
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        with pytest.raises(SemsegError, match="nowhere"):
            semseg.evaluate(tmp_path / "nowhere", **QUIET)
        assert GlobalHydra.instance().is_initialized() and hydra.compose("config", ["seed=7"]).seed == 7


@pytest.mark.slow
def test_a_check_says_whether_data_are_ready(trained: TrainingRun, tmp_path: Path) -> None:
    ready = semseg.check(*RUN, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path / "a")
    assert ready.is_ready and ready.command.startswith("python run.py") and ready.page is not None
    for folder, value in (("images", 7), ("masks", 9)):
        for split in ("training", "validation"):
            path = tmp_path / "data" / folder / split / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((32, 40, 3) if folder == "images" else (32, 40), value, np.uint8)).save(path)
    words = [word for word in RUN if not word.startswith("data")]
    for _ in range(2):  # the second check finds the folder of the first
        found = semseg.check(
            *words, data="folder", data__root=tmp_path / "data", data__num_classes=2, **QUIET, run_dir=tmp_path / "b"
        )
        assert not found.is_ready and any("9" in notice["text"] for notice in found.content["notices"])
    with pytest.raises(SemsegError, match="nothing"):
        semseg.check(data="folder", data__root=tmp_path / "nothing", **QUIET, run_dir=tmp_path / "b")


def test_a_call_is_its_mode_and_no_other(tmp_path: Path) -> None:
    for call in (semseg.check, semseg.train):
        with pytest.raises(ConfigError, match=r'mode="doctor": this call is mode=(check|train)\. Leave it out'):
            call(mode="doctor", run_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_page_about_python_is_true(trained: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls are valid, and have the results that it names; the network and the data set are those of this test."""
    scenes = trained.folder.parent / "scenes"
    own: dict[str, Any] = {"data": "scenes", "data__root": scenes}
    assert trained.ckpt is not None

    picture = next((scenes / "images" / "validation").iterdir())
    numbers = itertools.count()

    def compose(words: Sequence[str], keywords: dict[str, Any]) -> Config:
        return compose_run(parse_overrides(list_words(words, keywords)))[1]

    def replace_call(name: str, mode: str, *own_words: str) -> None:
        call = getattr(semseg, name)
        places = {"ckpt": trained.ckpt, "input": picture}
        keys = {"evaluate": ["ckpt"], "predict": ["ckpt", "input"]}.get(name, [])

        def run(*arguments: Any, **keywords: Any) -> Any:
            given = dict(zip(keys, arguments, strict=False)) | keywords
            compose([f"mode={mode}", *arguments[len(keys) :]], given)
            kept = {key: value for key, value in keywords.items() if key in ("predict__save", "eval__flip")}
            data = {} if keys else own  # that of the network
            run_dir = tmp_path / f"{name}{next(numbers)}"
            return call(*(places[key] for key in keys), *own_words, **data, **kept, **QUIET, run_dir=run_dir)

        monkeypatch.setattr(semseg, name, run)

    replace_call("check", "check", *RUN)
    replace_call("train", "train", *RUN)
    replace_call("evaluate", "eval")
    replace_call("predict", "predict")
    monkeypatch.chdir(tmp_path)
    text = (CONFIG_DIR.parent / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["checked"].is_ready and names["run"].score == trained.score and names["net"].classes
    assert {path.name.rpartition("_")[2] for path in names["written"].files} == {"ids.png", "overlay.png"}
    given: list[Config] = []
    monkeypatch.setattr(semseg, "train", lambda *words, **keywords: given.append(compose(words, keywords)))
    exec(blocks[1], names)
    assert len(given) == 3 and given[0] != given[1]
    results_of = {type(value).__name__: value for value in names.values()}
    for name, attribute in re.findall(r"`(TrainingRun|Evaluation|Predictions|DataCheck)\.(\w+)`", text):
        assert hasattr(results_of[name], attribute), (name, attribute)


@pytest.mark.long
def test_several_devices_run_in_processes_of_their_own(trained: TrainingRun, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("data.root")]
    run = semseg.train(
        *words, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path, trainer__devices=2
    )
    assert run.score is not None and run.ckpt is not None
    with pytest.raises(SemsegError, match="exit code"):
        semseg.train(
            *words, **QUIET, data__root=trained.folder.parent / "scenes", run_dir=tmp_path / "b", trainer__devices=2,
            optim__lr=1e30, loss__terms__cross_entropy=1e30,
        )  # fmt: skip

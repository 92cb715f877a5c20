"""The entry point: messages, exit codes, no torch before the configuration is checked."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import RUN, TINY, TINY_NETWORK, run, run_here
from semseg.cli.main import compose_run
from semseg.config.overrides import parse_device_indices, parse_overrides, quote_override
from semseg.config.schema import EvalConfig
from semseg.config.uses import UNREAD_KEYS
from semseg.errors import ConfigError


@pytest.mark.slow
def test_help_lists_models_data_sets_and_sections(tmp_path: Path) -> None:
    page = run_here(tmp_path, "--help")
    for name in ("upernet50", "resnet50_dilated8_ppm_deepsup", "ade20k", "camvid", "scenes", "mode=predict", "eval.*"):
        assert name in page


def test_prediction_reads_or_refuses_every_key_of_evaluation() -> None:
    keys = {f"eval.{field.name}" for field in dataclasses.fields(EvalConfig)}
    # The default of predict.scales, and the windows of native resolution that go through the network together.
    assert keys - set(UNREAD_KEYS["predict"]) == {"eval.scales", "eval.batch_size"}


PREDICT = ["mode=predict", "ckpt=x", "input=a.jpg"]
LISTED = ["data=folder", "data.num_classes=2", "data.train.list=a.csv"]
EXPORT = ["mode=export", "ckpt=x", "output=x.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mode=eval", "ckpt=x", "predict.flip=true"],
            "predict.flip=true: has no effect with mode=eval. Use eval.flip.",
        ),
        ([*PREDICT, "eval.window=64"], "eval.window=64: has no effect with mode=predict. Use predict.window."),
        ([*PREDICT, "model.compile=true"], "model.compile=true: has no effect with mode=predict. It is for training"),
        (
            [*EXPORT, "predict.threshold=0.1"],
            "predict.threshold=0.1: has no effect with mode=export. An exported file does not",
        ),
        (
            ["mode=eval", "ckpt=x", "predict.threshold=0.3"],
            "predict.threshold=0.3: has no effect with mode=eval. Scores are those of the most probable class",
        ),
        (["mode=eval", "ckpt=x", "input=a"], "input=a: has no effect with mode=eval. It scores a data set: data.root"),
        ([*PREDICT, "output=b"], "output=b: has no effect with mode=predict. The predictions are written to run_dir="),
        ([*PREDICT, "eval.split=test"], "eval.split=test: has no effect with mode=predict. It predicts the images of"),
        (
            [*PREDICT, "input=b.jpg"],
            "'input=a.jpg' 'input=b.jpg': input has one value. Give both in a folder, a pattern",
        ),
        ([*PREDICT, "ckpt=y"], "'ckpt=x' 'ckpt=y': ckpt has one value. Give one, or several networks as ckpt=["),
        ([*PREDICT, "predict.save=[]"], "predict.save=[]: nothing would be written. Give at least one of ids,"),
        (
            ["model.encoder.frozen=true", "optim.lr_encoder=0.1"],
            "optim.lr_encoder=0.1: has no effect. model.encoder.frozen=true leaves the encoder as it is.",
        ),
        (
            [*PREDICT, "predict.image_prefix=/photos/"],
            "predict.image_prefix=/photos/: has no effect. It is for predict.save=[coco] and [label_studio].",
        ),
        (
            [*EXPORT, "export.quantize=dynamic", "export.calibration_images=8"],
            "export.calibration_images=8: has no effect. It is for export.quantize=static.",
        ),
        ([*EXPORT, "export.score_images=8"], "export.score_images=8: has no effect. It is for export.quantize."),
        (
            ["mode=eval", "ckpt=x", "trainer.fast_dev_run=true"],
            "trainer.fast_dev_run=true: has no effect with mode=eval. data.limit=<number> scores the first images",
        ),
        (
            ["mode=bench", "trainer.limit_train_batches=2"],
            "trainer.limit_train_batches=2: has no effect with mode=bench. bench.steps is the number of steps",
        ),
        (
            ["mode=serve", "ckpt=x", "predict.save=[ids]"],
            "predict.save=[ids]: has no effect with mode=serve. It is for the files of mode=predict.",
        ),
        (
            ["data=folder", "data.num_classes=2", "data.images=i", "data.masks=m", "data.root=r"],
            "data.root=r: has no effect. With data.images, paths start at the working directory.",
        ),
        (
            ["mode=crossval", "data.folds=3", "eval.split=train"],
            "eval.split=train: mode=crossval scores every network on its fold. Leave it out.",
        ),
        ([*EXPORT, "predict.min_confidence=0.9"], "predict.min_confidence=0.9: has no effect with mode=export. An"),
        ([*PREDICT, "data.limit=2"], "data.limit=2: has no effect with mode=predict. It is for data sets."),
        (
            ["mode=average", "ckpt=[a,b]", "data.on_bad=skip"],
            "data.on_bad=skip: has no effect with mode=average. An image that cannot be read ends it.",
        ),
        ([*PREDICT, "output=error"], "output=error: has no effect with mode=predict. The predictions are written to"),
        (["output=x.ckpt"], "output=x.ckpt: has no effect with mode=train. All files are written to run_dir="),
        (["data.short_edges=[64.5]"], "data.short_edges[0]=64.5: must be a whole number."),
        (["syncbn=off", "syncbn.group=node"], "syncbn.group=node: has no effect. It is for syncbn=reduce."),
        (["trainer.accelerator=tpux"], "trainer.accelerator=tpux: not known. Valid: auto, cpu, gpu, cuda, mps."),
        (["optim.lr_images=8"], "optim.lr_images=8: has no effect. It is for optim.lr=auto."),
        (["data.max_bad=0.1"], "data.max_bad=0.1: has no effect. It is for data.on_bad=skip."),
        (["augment.blur_sigma=[1,2]"], "augment.blur_sigma=[1.0, 2.0]: has no effect. It is for augment.blur."),
        (
            ["checkpoint.keep=2", "checkpoint.every_n_minutes=null"],
            "checkpoint.keep=2: has no effect. It is for checkpoint.every_n_steps or every_n_minutes.",
        ),
        (["schedule.warmup_steps=9"], "schedule.warmup_steps=9: has no effect. It is for schedule=poly_warmup and"),
        (["schedule.min_factor=0.5"], "schedule.min_factor=0.5: has no effect. It is for schedule=cosine."),
        (["schedule=cosine", "schedule.power=1"], "schedule.power=1.0: has no effect. It is for schedule=poly"),
        (["optim.beta2=0.5"], "optim.beta2=0.5: has no effect. It is for optim=adamw."),
        (
            ["optim.lr=5", "optim.lr_encoder=0.1", "optim.lr_decoder=0.1"],
            "optim.lr=5.0: has no effect. optim.lr_encoder and optim.lr_decoder are the rates of both parts.",
        ),
        (["ema.start_step=9"], "ema.start_step=9: has no effect. There is no average without ema.decay."),
        (
            ["model/decoder=ppm", "model.deepsup_weight=1"],
            "model.deepsup_weight=1.0: has no effect. It is for decoders",
        ),
        (["model=upernet50", "model.deepsup_weight=1"], "model.deepsup_weight=1.0: has no effect. It is for decoders"),
        (
            ["eval.boundary_ratio=0.1"],
            "eval.boundary_ratio=0.1: has no effect. It is for eval.boundary_iou=true.",
        ),
        (["loss.focal_gamma=3"], "loss.focal_gamma=3.0: has no effect. It is for loss=focal."),
        (["data.name=Anna's"], """cannot read "data.name=Anna's". Quote the value: 'data.name="Anna'"'"'s"'"""),
        (
            ["mode=predict", "ckpt=x", "input=[0-9]*.jpg"],
            "cannot read 'input=[0-9]*.jpg'. Quote the value: 'input=\"[0",
        ),
        (["augment.crop=[32,32"], "cannot read 'augment.crop=[32,32': its bracket is not closed."),
        (["loss.ohem_min_kept=1"], "loss.ohem_min_kept=1.0: has no effect. It is for loss=ohem."),
        ([*LISTED, "data.train.stems=s.txt"], "data.train.stems=s.txt: has no effect. data.train.list=a.csv names the"),
        ([*LISTED, "data.train.masks=m"], "data.train.masks=m: has no effect. data.train.list=a.csv names the images."),
        ([*LISTED, "data.mask_suffix=_x"], "data.mask_suffix=_x: has no effect. A list names images and masks"),
        (
            [*LISTED, "data.images=i", "data.masks=m"],
            "data.train.list=a.csv: has no effect. data.images=i names the images.",
        ),
        ([*LISTED, "data.val.masks=m"], "data.val.masks=m: has no effect. It needs data.val.images=<folder>."),
        (
            [*LISTED, "data.val.stems=s.txt", "data.val_fraction=0.3"],
            "data.val_fraction=0.3: has no effect. data.val.stems=s.txt names the images of val.",
        ),
        (["after_training=[eval,predict]"], "after_training=[predict] needs input="),
        (
            ["input=photos"],
            "input=photos: has no effect with mode=train. Give mode=predict, or after_training=[predict]",
        ),
        (["mode=check", "input=photos"], "input=photos: has no effect with mode=check. Give mode=predict, or after_"),
        (["run_dir=[a,b]"], "run_dir: must be text, not a list."),
        (["mode=predict", "ckpt=x", "input=[a,b]"], "input=['a', 'b']: must be text, not a list: a folder, a pattern"),
    ],
)
def test_what_a_mode_cannot_use_is_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path
) -> None:
    assert run_here(tmp_path, *words, code=2).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["data.mask_suffix=_ids", "data.mix=[{images: i, masks: m, share: 0.5}]"],
        ["data.image_suffix=_B4", "data.bands=[red,nir]", "data.band_files={nir: _B8}", "data.value_range=[0,1]"],
        ["data.val.images=i", "data.val.masks=m", "data.val_fraction=0.0"],
        ["data.train.stems=''", "data.train.images=null", "schedule.min_factor=0.0"],
        ["debug=overfit", "data.val_fraction=0.2"],
        ["debug=fast", "input=photos"],
        ["optim.beta2=0.5", "resume=old.ckpt"],
        ["optim.beta2=0.5", "run_dir=begun"],
        ["mode=eval", "ckpt=x", "optim.beta2=0.5"],
    ],
)
def test_words_that_have_an_effect_or_belong_to_a_run_are_not_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    compose_run(parse_overrides([*LISTED, *words]))


def test_a_job_of_a_sweep_and_a_rank_may_have_words_that_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    words = parse_overrides([*LISTED, "optim=sgd", "optim.beta2=0.5"])
    with pytest.raises(ConfigError, match=r"optim\.beta2=0\.5: has no effect"):
        compose_run(words)
    with monkeypatch.context() as patch:
        patch.setenv("SEMSEG_SWEEP", "elsewhere 1 2")
        compose_run(words)
    monkeypatch.setenv("LOCAL_RANK", "1")  # of mode=rerun on two devices
    with pytest.raises(ConfigError, match=r"optim\.beta2=0\.5: has no effect"):  # torchrun's
        compose_run(words)
    monkeypatch.setattr("semseg.cli.main.is_supervised", lambda: True)
    compose_run(words)


@pytest.mark.slow
def test_a_recipe_may_set_keys_that_a_mode_does_not_read(tmp_path: Path) -> None:
    """It serves several modes; and mode=rerun repeats what was accepted before."""
    (tmp_path / "recipe.yaml").write_text("model: {compile: true}\npredict: {threshold: auto, flip: true}\n")
    for words in (["mode=predict", "input=x"], ["mode=export", "output=x.onnx"], ["mode=eval"]):
        printed = run_here(tmp_path, *words, "ckpt=none.ckpt", "experiment=recipe.yaml", code=1)
        assert "none.ckpt: there is no such file" in printed or "input=x: there is no such file" in printed
    record = tmp_path / "run" / ".hydra" / "overrides.yaml"
    record.parent.mkdir(parents=True)
    record.write_text("- mode=predict\n- ckpt=none.ckpt\n- input=x\n- eval.flip=true\n")
    assert "input=x: there is no such file" in run_here(tmp_path, "mode=rerun", "run=run", code=1)


@pytest.mark.parametrize("word", ["run_dir=file", "run_dir=file/sub", "runs_dir=file"])
def test_a_run_folder_that_would_be_a_file_or_lie_below_one_is_refused(word: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    printed = run_here(tmp_path, *TINY, word, code=2)
    assert f"cannot be created, because {tmp_path / 'file'} is no folder. Set run_dir or runs_dir." in printed
    printed = run_here(tmp_path, *TINY, "-m", "seed=1,2", "sweep_dir=file", code=2)
    assert "is no folder. Set sweep_dir." in printed


@pytest.mark.parametrize("words", [["mode=export"], ["mode=convert"], ["mode=check", *TINY]])
def test_an_output_that_cannot_be_there_is_refused_before_anything_is_read(words: list[str], tmp_path: Path) -> None:
    suffix = {"mode=export": ".onnx", "mode=convert": ".ckpt", "mode=check": ".yaml"}[words[0]]
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    printed = run_here(tmp_path, *words, "ckpt=none", f"output=file/x{suffix}", code=2)
    assert f"cannot be created, because {tmp_path / 'file'} is no folder. Set output." in printed
    printed = run_here(tmp_path, *words, "ckpt=none", f"output=folder{suffix}", code=2)
    assert f"folder{suffix}: is a folder. Give the name of a file." in printed


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, which takes no folders")
@pytest.mark.parametrize("words", [["mode=predict", "ckpt=x", "input=."], TINY])
def test_a_run_folder_where_none_can_be_created_is_refused(words: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    printed = run_here(tmp_path, *words, "run_dir=/proc/semseg/run", code=2)
    assert "error: /proc/semseg/run: this folder cannot be created. Set run_dir or runs_dir." in printed


def test_a_refused_prediction_writes_nothing_beside_the_inputs(tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8)).save(photo)
    printed = run_here(tmp_path, "mode=predict", "ckpt=x", "input=photos", "run_dir=photos", code=2)
    assert "holds inputs, which outputs could overwrite" in printed
    assert list(photo.parent.iterdir()) == [photo]


@pytest.mark.slow
def test_initial_weights_that_do_not_exist_are_named_by_their_key(tmp_path: Path) -> None:
    printed = run_here(tmp_path, *TINY, *TINY_NETWORK, "init_from=none.ckpt", code=1)
    assert "error: init_from=none.ckpt: there is no such file" in printed


@pytest.mark.slow
def test_a_run_says_its_rates_and_which_weights_get_no_score(tmp_path: Path) -> None:
    words = ["trainer.max_epochs=2", "trainer.max_steps=3", "optim.lr_encoder=0.001"]
    printed = run_here(tmp_path, *TINY, *TINY_NETWORK, "run_dir=run", *words)
    assert ", sgd with lr 0.02 (encoder 0.001), " in printed
    unwrapped = " ".join(printed.split())
    assert "validation the last is after step 2: the weights of the end, after step 3, get no score" in unwrapped


def test_a_run_that_is_never_validated_says_so_and_names_no_report(tmp_path: Path) -> None:
    """Its follow-up fails, and its last lines are there all the same; the same command runs it once it can."""
    words = [*TINY, *TINY_NETWORK, "run_dir=run", "after_training=[predict]", "input=photo.png", "trainer.max_steps=1"]
    words += ["schedule=poly_warmup", "schedule.warmup_steps=3"]
    printed = run_here(tmp_path, *words, code=1)
    assert printed.rstrip().endswith("error: input=photo.png: there is no such file or folder.")
    assert not (tmp_path / "run").exists()  # before anything else
    (tmp_path / "photo.png").write_bytes(b"no image")
    printed = run_here(tmp_path, *words, code=1)
    assert "training    1 step (all of them warm-up: schedule.warmup_steps=3), 2 an epoch, sgd" in printed
    assert "validation  none, because the run ends at step 1 and the first would be after step 2" in printed
    assert "to continue     " in printed and "report   " not in printed and not (tmp_path / "run/report.html").exists()
    assert printed.rstrip().endswith(
        "1 file could not be read, see above; 0 of 1 files predicted, written to run/predict."
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    for is_done in (False, True):
        printed = run_here(tmp_path, *words)
        assert "already finished" in printed and ("1 of 1 files predicted" in printed) != is_done
    assert (tmp_path / "run" / "predict" / "photo_ids.png").is_file()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["follow_ups"] == {"predict": "predict"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["after_training=[eval]", "eval.split=test"], "data.test: "),
        (["after_training=[predict]", "input=.", "predict.threshold=0.3"], "threshold=0.3: is for networks of two"),
        (["after_training=[predict]", "input=.", "predict.threshold=auto"], "threshold=auto: is for networks of two"),
    ],
)
def test_what_a_follow_up_would_refuse_is_reported_before_training(
    tmp_path: Path, words: list[str], message: str
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    printed = run_here(tmp_path, *TINY, *TINY_NETWORK, "run_dir=run", *words, code=2 if "threshold" in message else 1)
    assert f"error: {message}" in printed and "epoch 1" not in printed


def test_a_finished_run_says_where_its_evaluation_is_and_how_to_make_another(tmp_path: Path) -> None:
    words = [*TINY, *TINY_NETWORK, "run_dir=run", "after_training=[eval]", "trainer.max_steps=2"]
    run_here(tmp_path, *words)
    printed = " ".join(run_here(tmp_path, *words, "eval.flip=true").split())
    assert "the evaluation was written to run/eval; with other settings: python run.py mode=eval ckpt=run/" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lrr=3"], "optim.lr?"),
        (["modle=upernet50"], "model?"),
        (["model=upernet51"], "model=upernet50?"),
        (["mode=evl"], "mode=eval?"),
        (["model.encoder.weigths=x"], "model.encoder.weights?"),
        (["optim.lr=abc"], "optim.lr=abc"),
        (["seed=1,2"], "seed=1,2: has several values. A list has brackets: seed=[1,2]. A sweep over them is for the"),
        (["optim.lr"], "key=value"),
        (["data.name=a=b"], "'data.name=\"a=b\"'"),
        (["mode=eval"], "ckpt="),
    ],
)
def test_a_mistake_ends_in_three_lines_and_exit_code_2_and_leaves_nothing(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    output = run_here(tmp_path, *words, code=2)
    assert expected in output
    assert output.startswith("error: ") and len(output.strip().splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_composed_and_checked_without_torch() -> None:
    code = (
        "import sys; from semseg.config.compose import compose_config; from semseg.config.validate import check_config;"
        "check_config(compose_config(['model=upernet50']));"
        "assert not {'torch', 'pytorch_lightning', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=RUN.parent, check=True)


def test_missing_data_is_one_line_with_the_folder_and_the_command_to_get_it(tmp_path: Path) -> None:
    output = run(tmp_path, "data.root=nowhere", "model.encoder.weights=none", code=1)
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and output.endswith(f"{error[0]}\n")
    assert "nowhere" in error[0] and "mode=download data=ade20k" in error[0]


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        ("trainer.devices=0-3", "trainer.devices=[0,1,2,3]"),
        ("trainer.devices=0,2", "trainer.devices=[0,2]"),
        ("trainer.devices=8", "trainer.devices=8"),
        ("trainer.devices=auto", "trainer.devices=auto"),
        ("ckpt=a=b.ckpt", 'ckpt="a=b.ckpt"'),
        ("input=my photos/a,b.jpg", 'input="my photos/a,b.jpg"'),
        ("data.train.images=im[1]", 'data.train.images="im[1]"'),
        ("data.val.list=a;b.csv", 'data.val.list="a;b.csv"'),
        ("data.root=日本", 'data.root="日本"'),
        ("run_dir=2024_11_28", 'run_dir="2024_11_28"'),  # a number to Hydra
        ("data.root=true", 'data.root="true"'),
        ("data.masks=null", "data.masks=null"),
        ("input=photos/**/*.jpg", "input=photos/**/*.jpg"),
        ("run_dir=runs/${now:%Y}", "run_dir=runs/${now:%Y}"),
        ("optim.lr=0.1", "optim.lr=0.1"),
        ("--help", "--help"),
    ],
)
def test_arguments_are_quoted_for_hydra(typed: str, quoted: str) -> None:
    assert quote_override(typed) == quoted


@pytest.mark.reliability
def test_c33_the_name_of_an_existing_file_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert quote_override("data.root=[a]") == "data.root=[a]"
    (tmp_path / "[a]").mkdir()
    assert quote_override("data.root=[a]") == 'data.root="[a]"'


def test_a_comma_in_a_sweep_stays_a_sweep() -> None:
    assert quote_override("trainer.devices=1,2", sweep=True) == "trainer.devices=1,2"
    assert quote_override("trainer.devices=0-1", sweep=True) == "trainer.devices=[0,1]"


def test_device_ranges_may_be_mixed() -> None:
    assert parse_device_indices("0,2-4") == [0, 2, 3, 4]


def test_home_is_expanded_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert quote_override("data.root=~/data") == 'data.root="/home/someone/data"'


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("data.short_edges=60", "must be a list, such as [60]."),
        ("data.num_classes=five", "must be a whole number."),
        ("optim.lr=fast", "must be a number, or auto."),
        ("optim.weight_decay=fast", "must be a number."),
        ("data.flip=maybe", "must be true or false."),
        ("data.crop=64", "must be a list, such as [64,64]."),
        ("data.ignore_colors=[255,255,255]", "must be a list of lists, such as [[0,0,0]]."),
        ("data.num_classes=[3]", "must be a whole number."),
        ("data.root=['a', 'b']", "must be text, not a list."),
    ],
)
def test_a_value_of_another_type_is_explained_in_our_words(word: str, rule: str, tmp_path: Path) -> None:
    assert run_here(tmp_path, word, code=2) == f"error: {word}: {rule}\n"


def test_a_missing_package_is_one_line_that_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise ModuleNotFoundError(\"No module named 'hydra'\", name='hydra')\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{RUN.parent}", "PATH": "/usr/bin:/bin"}
    missing = subprocess.run(
        [sys.executable, str(RUN)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1 and "hydra" in missing.stderr


@pytest.mark.slow
def test_a_wrong_number_of_classes_is_reported_before_weights_are_downloaded(tmp_path: Path) -> None:
    words = ["data=folder", "data.root=mine", "data.val_fraction=0", "data.num_classes=2", "download.offline=true"]
    for name in ("images", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((40, 48), 9, np.uint8)).save(tmp_path / "mine" / name / f"{number}.png")
    output = run_here(tmp_path, *words, code=1)
    assert "ids 9" in output or "id 9" in output
    assert "download" not in output[output.rindex("error:") :]

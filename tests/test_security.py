"""Nothing that is read from a file runs code: rows G of what must hold.

Archives (G5) are in test_archive.py, downloads (G6) in test_download.py, the server (G8) in test_server.py, round trips
between formats (G7) in modes/test_convert.py.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK, run
from helpers.in_process import configured, read_state
from helpers.published_files import served
from semseg import build
from semseg.build import open_network
from semseg.checkpoints.atomic_io import AtomicCheckpointIO, find_newest_intact
from semseg.checkpoints.format import FORMAT_KEY, load_plain, load_weights, read_checkpoint, write_safetensors
from semseg.checkpoints.network import build_network
from semseg.checkpoints.zoo import ZOO
from semseg.config.compose import compose_config
from semseg.config.explain import explain_hydra_error
from semseg.config.groups import CONFIG_DIR
from semseg.config.overrides import parse_overrides
from semseg.config.schema import ALLOWED_TARGETS, split_network_options
from semseg.config.validate import check_config
from semseg.errors import CheckpointError, ConfigError, SemsegError
from semseg.nets.registry import ENCODERS, build_segmenter
from semseg.storage.download import fetch_file
from semseg.training import trainer

pytestmark = pytest.mark.reliability

ROOT = CONFIG_DIR.parent
RESNET18 = [word for word in TINY if not word.startswith("data.root=")]  # a network that published files may hold
SMALL = [*RESNET18, *TINY_NETWORK]
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
HOSTILE = "hostile_module"  # importing it, or calling anything in it, leaves a mark


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("security")
    with patch.dict(ENCODERS, TINY_ENCODERS):
        yield folder
    shutil.rmtree(folder)  # half a gigabyte of networks


@pytest.fixture(autouse=True)
def marker(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears if a payload runs; no test of this module may leave it."""
    path = place / "executed"
    path.unlink(missing_ok=True)
    code = f"from pathlib import Path\nmark = lambda *_, **__: Path({str(path)!r}).touch()\n"
    code += "mark()\nclass Mark(dict): pass\n"
    (place / f"{HOSTILE}.py").write_text(code)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.chdir(place)
    yield path
    assert not path.exists()
    assert HOSTILE not in sys.modules


class Payload:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"{sys.executable} -c 'import {HOSTILE}'",)


# ---- G1: no entry point executes code from a checkpoint


def with_pickle(content: dict[str, Any]) -> dict[str, Any]:
    return {"extra": Payload(), **content}


def with_nested_storage(content: dict[str, Any]) -> dict[str, Any]:
    """The payload hides where torch keeps what belongs to a state dict: deep in an attribute of it."""
    inner = OrderedDict(content.get("state_dict") or content)
    inner._metadata = OrderedDict({"": {"version": [{"deep": (Payload(),)}]}})  # pyright: ignore[reportAttributeAccessIssue]
    return {**content, "state_dict": inner}


def with_targets(content: dict[str, Any]) -> dict[str, Any]:
    """Plain data that Lightning or Hydra would take for something to call."""
    called = {"_target_": f"{HOSTILE}.mark", "_instantiator": f"{HOSTILE}.mark", "_class_path": f"{HOSTILE}.Mark"}
    hyper_parameters = {"_instantiator": f"{HOSTILE}.mark", "net": called, **called}
    return {**content, "hyper_parameters": hyper_parameters, "hparams_name": "kwargs", "hparams_type": HOSTILE}


PAYLOADS = {"pickle": with_pickle, "nested": with_nested_storage, "targets": with_targets}


@pytest.fixture(scope="module")
def honest(place: Path) -> dict[str, Any]:
    """The content of the last checkpoint of a short run; the images it learned from are in `place`/scenes."""
    from semseg.modes import train

    words = [
        *SMALL,
        f"data.root={place / 'scenes'}",
        f"run_dir={place / 'honest'}",
        "trainer.enable_progress_bar=false",
    ]
    (place / "honest").mkdir()
    train.run(configured(*words), words)
    return load_plain(place / "honest" / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module", params=PAYLOADS)
def files(request: pytest.FixtureRequest, place: Path, honest: dict[str, Any]) -> Path:
    """A folder with one file of every kind that we read, each with the payload."""
    add = PAYLOADS[request.param]
    folder = place / request.param
    run = folder / "runs" / "stranger" / "checkpoints"
    run.mkdir(parents=True)
    torch.save(add(honest), run / "last.ckpt")
    os.link(run / "last.ckpt", run / "best.ckpt")
    weights = build_segmenter("resnet18", "c1", 11).state_dict()
    if request.param != "targets":  # the others are refused before the weights are used
        weights = {name: value.flatten()[:1].clone() for name, value in weights.items()}
    for part in ("encoder", "decoder"):
        flat = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(part)}
        torch.save(add(flat), folder / f"{part}_epoch_1.pth")
    torch.save(add({"step": 1, "batches": []}), folder / "batches.pt")
    torch.save(add(dict(weights)), folder / "old.pth", _use_new_zipfile_serialization=False)
    saved = read_checkpoint(place / "honest" / "checkpoints" / "last.ckpt")
    _, description = write_safetensors(folder / "net.safetensors", saved)
    description.write_text(json.dumps(with_targets(json.loads(description.read_text()))))
    if request.param != "targets":
        (folder / "net.safetensors").write_bytes((folder / "old.pth").read_bytes())
    cache = folder / "cache" / ZOO["upernet50"].folder
    cache.mkdir(parents=True)
    for url in ZOO["upernet50"].urls():
        part = Path(url).name.partition("_")[0]
        (cache / Path(url).name).symlink_to(folder / f"{part}_epoch_1.pth")
    Image.new("RGB", (40, 40)).save(folder / "photo.png")
    return folder


def mode(name: str, *words: str, out: str = "out") -> Callable[[Path], object]:
    """Run a mode, {f} in its words standing for the folder of the files."""

    def run(folder: Path) -> object:
        scenes = f"data.root={folder.parent / 'scenes'}"
        common = [f"mode={name}", scenes, "trainer=cpu", "trainer.enable_progress_bar=false"]
        given = parse_overrides([*common, *(word.format(f=folder) for word in words)])
        config = configured(*given, f"run_dir={folder / f'{out}_{name}'}")
        return importlib.import_module(f"semseg.modes.{name}").run(config, given)

    return run


def train(*words: str) -> Callable[[Path], object]:
    return mode("train", *SMALL, "trainer.limit_val_batches=0", *words)


def encoder_weights(folder: Path) -> object:
    words = [*RESNET18, f"model.encoder.weights={folder / 'encoder_epoch_1.pth'}"]
    return build_network(configured(*words).model, 12)


def from_the_cache(folder: Path) -> object:
    words = ["mode=eval", "ckpt=zoo:upernet50", f"download.cache={folder / 'cache'}", "download.offline=true"]
    return open_network(configured(*words), words)


def in_cache(folder: Path) -> object:
    config = configured(f"download.cache={folder / 'cache'}", "download.offline=true")
    url = ZOO["upernet50"].urls()[0]
    return load_weights(fetch_file(url, config.download, folder=ZOO["upernet50"].folder))


CKPT = "{f}/runs/stranger/checkpoints/last.ckpt"
ENTRY_POINTS: dict[str, Callable[[Path], object]] = {
    "ckpt=<file>, convert": mode("convert", f"ckpt={CKPT}", "output={f}/out.safetensors"),
    "ckpt=<safetensors>, convert": mode("convert", "ckpt={f}/net.safetensors", "output={f}/out.ckpt"),
    "ckpt=<folder of files>, convert": mode("convert", "ckpt={f}", "output={f}/out2.ckpt"),
    "ckpt=<two files>, convert": mode(
        "convert", "ckpt={f}/encoder_epoch_1.pth,{f}/decoder_epoch_1.pth", "output={f}/again"
    ),
    "ckpt=last, eval": mode("eval", "ckpt=last", "runs_dir={f}/runs", "eval.scales=[32]"),
    "ckpt=<run folder>, predict": mode("predict", "ckpt={f}/runs/stranger", "input={f}/photo.png", "eval.scales=[32]"),
    "ckpt=<file>, replay": mode("replay", f"ckpt={CKPT}", "input={f}/batches.pt"),
    "ckpt=zoo:, from the cache": from_the_cache,
    "ckpt=<file>, train": train(f"ckpt={CKPT}", "resume_force=true"),
    "ckpt=<folder of files>, train": mode(
        "train", *RESNET18, "trainer.limit_val_batches=0", "ckpt={f}", out="resnet18"
    ),
    "resume=<file>": train(f"resume={CKPT}", "trainer.max_epochs=2"),
    "resume=auto": lambda folder: find_newest_intact(folder / "runs/stranger/checkpoints"),
    "init_from=<file>": train(f"init_from={CKPT}"),
    "init_from=<safetensors>": train("init_from={f}/net.safetensors"),
    "model.encoder.weights=<file>": encoder_weights,
    "a file before torch 1.6": lambda folder: load_weights(folder / "old.pth"),
    "a download": in_cache,
    "Trainer.fit(ckpt_path)": lambda folder: AtomicCheckpointIO().load_checkpoint(CKPT.format(f=folder)),
    "where a run is": lambda folder: read_state(Path(CKPT.format(f=folder)), configured()),
}


# Where the payload hides in a file makes a difference to the functions that read files, which these entry points cover.
NESTED_ENTRY_POINTS = (
    "ckpt=<file>, convert", "ckpt=<safetensors>, convert", "ckpt=<two files>, convert", "ckpt=<file>, replay",
    "resume=<file>", "resume=auto", "a file before torch 1.6", "Trainer.fit(ckpt_path)", "where a run is",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_g1_no_entry_point_runs_code_from_a_checkpoint(entry: str, files: Path) -> None:
    if files.name == "nested" and entry not in NESTED_ENTRY_POINTS:
        pytest.skip("reads the file with a function that another entry point covers")
    try:
        ENTRY_POINTS[entry](files)
    except SemsegError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
        assert "weights_only" not in str(error)  # no advice to load it unsafely
        assert files.name != "targets"
    else:
        assert files.name == "targets" or entry == "resume=auto"  # words that nobody reads do no harm


@pytest.mark.slow
def test_g1_the_payloads_would_run_if_they_were_let(files: Path, marker: Path) -> None:
    if files.name == "targets":
        return  # what it names is called in the test of G3
    for path in [*files.glob("*.pth"), files / "batches.pt", Path(CKPT.format(f=files))]:
        torch.load(path, weights_only=False)
        assert marker.exists()
        marker.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ckpt", "resume", "init_from", "model.encoder.weights"])
def test_g1_an_address_is_no_file_and_is_not_opened(key: str, place: Path, honest: dict[str, Any]) -> None:
    torch.save({"extra": Payload()}, place / "remote.ckpt")
    with served(place) as server, pytest.raises(SemsegError, match=r"no such file|remote\.ckpt"):
        mode("train", *SMALL, f"{key}={server}/remote.ckpt")(place)


def test_g1_the_message_names_what_the_file_would_have_called(place: Path) -> None:
    torch.save({"extra": Payload()}, place / "bad.pth")
    with pytest.raises(
        CheckpointError, match=r"bad\.pth: holds more than tensors and plain containers: posix\.system\."
    ):
        load_plain(place / "bad.pth")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["mode=convert", "ckpt=bad.ckpt", "output=out.ckpt"],
        pytest.param(["mode=eval", "ckpt=bad.ckpt"], marks=pytest.mark.long),
        pytest.param(["mode=predict", "ckpt=bad.ckpt", "input=."], marks=pytest.mark.long),
        pytest.param([*SMALL, "data.root=scenes", "init_from=bad.ckpt"], marks=pytest.mark.long),
        pytest.param([*SMALL, "data.root=scenes", "resume=bad.ckpt"], marks=pytest.mark.long),
        pytest.param([*SMALL, "data.root=scenes", "model.encoder.weights=bad.ckpt"], marks=pytest.mark.long),
    ],
)
def test_g1_the_command_line_says_so_in_one_line(words: list[str], place: Path, honest: dict[str, Any]) -> None:
    torch.save({"extra": Payload(), "state_dict": {}}, place / "bad.ckpt")
    output = run(place, *words, code=1)
    assert "bad.ckpt: holds more than tensors" in output and len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["- --experimental-rerun=bad.pkl"], ["- -m"], ["- hydra.callbacks.x._target_=hostile_module.mark"],
              ["- +callbacks.x._target_=hostile_module.mark"], ["- hydra/launcher=hostile_module"], ["a: b"], ["[["],
              ["!!python/object/apply:os.system [exit]"], ["- 1"], ["- ~hydra.run"],
              ["- +logger@hydra.callbacks.x=csv"], ["- ++hydra.launcher._target_=hostile_module.mark"]],
)  # fmt: skip
def test_g1_a_run_folder_of_a_stranger_cannot_run_code_when_it_is_repeated(words: list[str], place: Path) -> None:
    saved = place / "stranger" / ".hydra" / "overrides.yaml"
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text("\n".join(words) + "\n")
    with pytest.raises(ConfigError) as caught:
        check_config(compose_config(parse_overrides(["mode=rerun", "run=stranger"])))
    assert "\n" not in str(caught.value)


def test_words_of_a_saved_run_that_are_gone_since_are_left_out_when_it_is_repeated(place: Path) -> None:
    saved = place / "before" / ".hydra" / "overrides.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("- trainer.on_oom=retry\n- ++trainer.on_oom=retry\n- seed=7\n")
    words = parse_overrides(["mode=rerun", "run=before"])
    assert words == ["seed=7"] and configured(*words).seed == 7


@pytest.mark.parametrize("option", ["--experimental-rerun", "--experimental", "-cd", "--config-dir", "--config-name=x"])
def test_g1_options_that_load_files_of_other_places_are_not_passed_on(option: str) -> None:
    with pytest.raises(ConfigError, match="there is no such option"):
        parse_overrides([option, "job.pickle"])


# ---- G2: no call that could run what a file says


class Finding(ast.NodeVisitor):
    """Collects calls in one source file that could run or write what a file says."""

    DANGEROUS = (
        r"(?:_?pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve|jsonpickle)\.\w+|Unpickler",
        r"yaml\.(?!safe_load$|safe_dump$|YAMLError$|BaseLoader$)\w+",
        r"(?:builtins\.)?(?:eval|exec|compile|__import__)",
        r"os\.(?:system|popen|exec\w+|spawn\w+|posix_spawn\w*)",
        r"(?:\w+\.)*(?:extractall|unpack_archive|load_from_checkpoint|allow_pickle)",
        r"torch\.(?:hub|jit|package)\.\w+|\w+\.load_state_dict_from_url",
        r"tempfile\.mktemp",
    )

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        is_open_load = name.endswith("torch.load") and keywords.get("weights_only") != "True"
        is_open_numpy = keywords.get("allow_pickle", "False") != "False"
        if is_open_load or is_open_numpy or any(re.fullmatch(pattern, name) for pattern in self.DANGEROUS):
            self.found.append(f"{node.lineno}: {name}")
        if keywords.get("shell", "False") != "False" or keywords.get("weights_only", "True") == "False":
            self.found.append(f"{node.lineno}: {name} with shell or weights_only")
        self.generic_visit(node)


def findings(source: str) -> list[str]:
    visitor = Finding()
    visitor.visit(ast.parse(source))
    return visitor.found


@pytest.mark.slow
def test_g2_no_source_file_calls_what_could_run_a_file() -> None:
    sources = [ROOT / "run.py", *(ROOT / "semseg").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(sources) > 50
    assert {str(path): found for path in sources if (found := findings(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(x)", "yaml.load(x)", "eval(x)",
     "exec(x)", "subprocess.run(x, shell=True)", "archive.extractall(x)", "shutil.unpack_archive(x)",
     "np.load(x, allow_pickle=True)", "Module.load_from_checkpoint(x)", "os.system(x)",
     "trainer.fit(m, weights_only=False)", "torch.hub.load(x)"],
)  # fmt: skip
def test_g2_finds_what_it_looks_for(source: str) -> None:
    assert findings(source)


def test_g2_harmless_calls_are_left_alone() -> None:
    assert findings("net.eval(); re.compile(x); yaml.safe_load(x); torch.load(x, weights_only=True)") == []


def test_g2_the_linter_has_the_security_rules() -> None:
    assert '"S"' in (ROOT / "pyproject.toml").read_text().partition("select =")[2].partition("]")[0]


# ---- G3: targets

NAMES = [
    f"{HOSTILE}.mark", f"{HOSTILE}", f"{HOSTILE}.Mark", "os.system", "posix.system", "builtins.eval", "builtins.exec",
    "subprocess.run", "subprocess.Popen", "logging.os.system", "pytorch_lightning.callbacks.os.system", "torch.load",
    "torch.hub.load", "torch.jit.load", "numpy.load", "shutil.rmtree", "pathlib.Path.touch", "importlib.import_module",
    "runpy.run_path", "webbrowser.open", "pickle.load", "semseg.cli.main.main", "semseg.training.loggers.csv.os.system",
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "functools.partial", "pydoc.locate",
    "PYTORCH_LIGHTNING.CALLBACKS.EARLYSTOPPING", "semseg.training.loggers.csv.CSVlog",
    "semseg.training.loggers.csv.CSVLog.__init__",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping", "pytorch_lightning.callbacks.Callback", "antigravity.x",
    "semseg.training.loggers.csv", "..semseg.training.loggers.csv.CSVLog", "",
]  # fmt: skip
FINE = "_target_: semseg.training.loggers.csv.CSVLog, folder: x"
EARLY = "_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: x"
MARK = f"{HOSTILE}.mark"
CALLBACKS = [  # values of callbacks.<name>
    f"{{{EARLY}, _partial_: true}}", f"{{{EARLY}, _args_: [1]}}", f"{{{EARLY}, _recursive_: false}}",
    f"{{{EARLY}, stopping_threshold: {{_target_: {MARK}}}}}", f"{{{EARLY}, a: [[{{_target_: {MARK}}}]]}}",
    f"{{{EARLY}, _Target_: {MARK}}}", f"{{{EARLY}, _convert_: all}}", f"{{_TARGET_: {MARK}}}",
    f"{{_target_: [{MARK}]}}",
    f"{{a: {{_target_: {MARK}}}}}", "{_target_: {}}", "null",
]  # fmt: skip
PLACES = [
    f"+callbacks.x=[{{_target_: {MARK}}}]", f"+callbacks.x={MARK}",
    f"+callbacks.x={{_target_: '${{oc.decode:\"{MARK}\"}}'}}",
    f"logger.csv._target_={MARK}", f"logger={{csv: {{_target_: {MARK}}}}}",
    f"+logger.x={{{FINE}, y: {{_target_: {MARK}}}}}",
    f"+_target_={MARK}", f"+data._target_={MARK}", f"+model.encoder._target_={MARK}",
    f"+model.decoder.x._target_={MARK}",
    f"+optim._target_={MARK}", f"+trainer.x._target_={MARK}", f"trainer.devices={{_target_: {MARK}}}",
    f"trainer.limit_train_batches=[{{_target_: {MARK}}}]", f"++data.train._target_={MARK}",
    f"model={{_target_: {MARK}}}",
]  # fmt: skip


@pytest.fixture
def no_new_module() -> Iterator[None]:
    """Fails if the test imports anything."""
    compose_config([])  # what Hydra itself imports for the first command line
    before = set(sys.modules)
    yield
    assert set(sys.modules) - before == set()


@pytest.mark.usefixtures("no_new_module")
def test_g3_every_target_that_is_not_on_the_list_is_refused_before_anything_is_imported() -> None:
    words = [f"+callbacks.x{index}._target_='{name}'" for index, name in enumerate(NAMES)]
    words += [f"+callbacks.x{index}={value}" for index, value in enumerate(CALLBACKS, start=len(NAMES))]
    with pytest.raises(ConfigError) as caught:
        check_config(compose_config(parse_overrides(words)))
    lines = str(caught.value).splitlines()
    missed = [i for i in range(len(words)) if not any(re.search(rf"callbacks\.x{i}\b", line) for line in lines)]
    assert missed == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_new_module")
@pytest.mark.parametrize("word", PLACES)
def test_g3_a_target_is_refused_wherever_it_is_before_anything_is_imported(word: str) -> None:
    with pytest.raises((SemsegError, *HYDRA_ERRORS)) as caught:
        check_config(compose_config(parse_overrides([word])))
    if isinstance(caught.value, HYDRA_ERRORS):
        assert "key" in explain_hydra_error(caught.value, [word]).lower()  # there is no such place


def test_g3_there_are_enough_of_them_and_the_honest_ones_pass() -> None:
    assert len(NAMES) + len(CALLBACKS) + len(PLACES) >= 60
    configured(*(f"+callbacks.x{i}._target_={target}" for i, target in enumerate(ALLOWED_TARGETS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-hub:stranger/model", "../x"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_g3_a_network_is_a_name_in_a_table_and_no_address(library: str, name: str) -> None:
    section = {"library": library, "name": name}
    assert split_network_options(section, "encoder") == (library, {"name": name})
    model = check_config(
        compose_config([*SMALL, f"+model.encoder.library={library}", f"model.encoder.name='{name}'"])
    ).model
    with pytest.raises(ConfigError, match=re.escape(name)):
        build_network(model, 2)


# ---- G4: a configuration inside a checkpoint is data


def with_saved_config(honest: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The checkpoint `honest` whose saved configuration has something else under `key`."""
    entry = json.loads(json.dumps(honest[FORMAT_KEY]))
    node = entry["config"]
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    return {**honest, FORMAT_KEY: entry}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks.x", {"_target_": MARK}),
        ("logger.x", {"_target_": MARK}),
        ("model.encoder._target_", MARK),
        ("model.decoder.x", [{"_target_": MARK}]),
        ("model.encoder.name", MARK),
        ("trainer.devices", {"_target_": MARK}),
        ("data.root", "${oc.env:HOME}"),
        ("data", "${oc.create:{}}"),
        ("model.encoder.library", HOSTILE),
    ],
)
def test_g4_a_saved_configuration_that_names_code_is_refused(
    key: str, value: object, place: Path, honest: dict[str, Any]
) -> None:
    path = place / "saved.ckpt"
    torch.save(with_saved_config(honest, key, value), path)
    for use in (lambda: build.restore_network(read_checkpoint(path)), lambda: build.restore_network(network(path))):
        with pytest.raises(SemsegError):
            use()


def network(path: Path) -> Any:
    words = ["mode=eval", f"ckpt={path}"]
    return open_network(configured(*words), words)[0]


@pytest.mark.slow
def test_g4_loggers_and_callbacks_of_a_saved_configuration_are_never_made(
    place: Path, honest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(trainer, "instantiate", made.append)
    path = place / "loggers.ckpt"
    for group in ("logger", "callbacks"):
        section = {"_target_": "semseg.training.loggers.external.TensorBoard", "save_dir": str(place / "written")}
        torch.save(with_saved_config(honest, f"{group}.x", section), path)
        mode("eval", f"ckpt={path}", "~logger.csv", "eval.scales=[32]")(place)
        saved, config = open_network(configured("mode=eval", f"ckpt={path}"), [])
        assert getattr(saved.config, group)["x"] == section  # it is there to be read
        assert "x" not in getattr(config, group)
    assert made == [] and not (place / "written").exists()


# ---- G7: see tests/modes/test_convert.py for the bytes


def test_g7_every_key_of_our_checkpoints_loads_as_plain_data(place: Path, honest: dict[str, Any]) -> None:
    for path in (place / "honest" / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", FORMAT_KEY} <= set(content)
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
        assert json.loads(json.dumps(content[FORMAT_KEY])) == content[FORMAT_KEY]

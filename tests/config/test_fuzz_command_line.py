"""Every command line is accepted or refused with one of our errors: row H2 of docs/reliability.md."""

from __future__ import annotations

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from semseg.config.compose import compose_config, translate_hydra_failures
from semseg.config.explain import explain_hydra_error
from semseg.config.groups import list_groups
from semseg.config.overrides import parse_overrides
from semseg.config.schema import list_keys
from semseg.config.validate import check_config
from semseg.errors import SemsegError

pytestmark = pytest.mark.reliability

REAL = [
    "mode=eval", "ckpt=last", "ckpt=runs/a=b/epoch=3.ckpt", "data=camvid", "data.root=~/my data", "model=upernet50",
    "model/encoder=resnet18", "model.encoder.weights=none", "optim.lr=0.01", "data.short_edges=[300,375]",
    "trainer.devices=0-3", "trainer.devices=0,2", "trainer.precision=16-mixed", "input=photos/a,b (1).jpg",
    "+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping", "+logger={}", "~logger.csv", "seed=1e3",
    "download.mirrors={http://a.org/x:['https://b.org/y']}", "run_dir=${runs_dir}/x", "after_training=[eval,predict]",
    "hydra.run.dir=x", "hydra/launcher=basic", "experiment=quickstart", "data.classes=null", "++optim.lr='0.1'",
    "model@net=upernet50", "+a@b:c=d", "data.hint=\"it's\"", "data.hint='a \\'b\\''", "eval.scales=range(1,5)",
    "optim.lr=choice(1,2)", "data.flip=on", "mode=rerun", "run=nowhere", "resume=null", "--cfg", "-m", "=", "",
]  # fmt: skip
PIECES = [
    *"=~+@:.,$\\{}[]()'\"/ -_%#!?*&^|<>;`0123456789aZ", "${", "${now:%S}", "${oc.env:HOME}", "${data.root}", "${nope}",
    "\\", "\\\\", "\n", "\r", "\t", "\0", "\x1b[31m", "\u2028", "\ud800", "é", "Ω", "٣", "²", "💥", "null", "nan",
    "-inf", "true", "1e999", "9" * 40, "9" * 5000, "0-99999999999", "../", "/etc/passwd", "[" * 30, "{" * 60, "(" * 200,
    "x" * 300,
    "a.b.c.", "hydra.", "_target_", "shuffle(", "interval(0,1)", "glob(*)", "cast(", "int(", "str(", "sort(", "???",
]  # fmt: skip


def mutate_argument(rng: random.Random) -> str:
    """An argument of a command line, real or made up, with up to four random changes."""
    word = rng.choice([*REAL, f"{rng.choice(KEYS)}={rng.choice(VALUES)}"])
    for _ in range(rng.randrange(5)):
        index = rng.randrange(len(word) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            word = word[:index] + rng.choice(PIECES) + word[index:]
        elif kind == 1:
            word = word[:index] + word[index + rng.randint(1, 3) :]
        elif kind == 2:
            word = word[:index] + rng.choice(REAL) + word[index:]
        else:
            word = word[:index] + chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) + word[index:]
    return word


KEYS = [*list_keys(), *list_groups(), "hydra.run.dir", "lr", "x", "logger.csv", "callbacks.x", "model.encoder.name"]
VALUES = [word.partition("=")[2] for word in REAL] + PIECES


def find_error(arguments: list[str], *, compose: bool) -> str | None:
    """The error message of `python run.py <arguments>`, or None; any other exception is a defect."""
    try:
        overrides = parse_overrides(arguments)
        if compose:
            check_config(compose_config([word for word in overrides if not word.startswith("-")]))
        else:
            parser = OverridesParser.create()
            for word in overrides:
                with translate_hydra_failures([word]):
                    parser.parse_override(word)
    except SemsegError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return explain_hydra_error(error, arguments)
    return None


def assert_short(message: str | None, arguments: list[str]) -> None:
    assert message is None or (message.strip() and len(message) < 20_000), arguments
    assert message is None or message.isprintable() or len(message.splitlines()) <= 12, arguments


def fuzz(count: int, *, arguments_each: int, compose: bool, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        arguments = [mutate_argument(rng) for _ in range(arguments_each)]
        try:
            assert_short(find_error(arguments, compose=compose), arguments)
        except Exception as error:
            pytest.fail(f"{arguments!a}: {type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_h2_any_argument_is_accepted_or_refused_with_a_message(count: int) -> None:
    fuzz(count, arguments_each=1, compose=False, seed=1)


@pytest.mark.parametrize("count", [30, pytest.param(1_000, marks=pytest.mark.long)])
def test_h2_any_command_line_is_composed_or_refused_with_a_message(count: int) -> None:
    fuzz(count, arguments_each=3, compose=True, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument",
    ["data.hint=" + "[" * 300, "seed=" + "9" * 5000, "data=" + "x" * 5000, "x" * 20_000, "data.hint=a\0b",
     *(f"+model.encoder.x={'[' * depth}1{']' * depth}" for depth in (60, 70, 80, 90, 300))],
    ids=range(10),
)  # fmt: skip
def test_h2_deep_long_and_unprintable_arguments_are_accepted_or_refused_with_a_message(argument: str) -> None:
    message = find_error([argument], compose=True)
    assert_short(message, [argument])
    assert message or "[1]" in argument

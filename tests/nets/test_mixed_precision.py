"""What trainer.precision=bf16-mixed computes in half precision and what in float32 on a GPU, by CUDA's own rules.

The CPU has other rules, so that a run there shows nothing. See helpers/numeric_types.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.fork_server import run_python

PROGRAM = Path(__file__).with_name("numeric_program.py")
HALF, SINGLE = "bfloat16", "float32"
pytestmark = [pytest.mark.slow, pytest.mark.reliability]


class Operation(NamedTuple):
    """Floating types of an operation."""

    name: str
    arguments: str
    results: str
    where: str  # file and function of the package; "backward" in a backward pass


Cases = dict[str, list[Operation]]


def run_program(folder: Path, *arguments: str) -> Cases:
    program = run_python(str(PROGRAM), *arguments, cwd=folder)
    assert program.returncode == 0, program.stdout
    cases = json.loads(program.stdout.splitlines()[-1])
    return {name: [Operation(*operation) for operation in operations] for name, operations in cases.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_program(tmp_path_factory.mktemp("types"))


def select(cases: Cases, kind: str) -> list[Operation]:
    chosen = [operation for name, operations in cases.items() if name.startswith(kind) for operation in operations]
    assert chosen
    return chosen


def types_of(operations: list[Operation], *names: str) -> set[tuple[str, str]]:
    return {(one.arguments, one.results) for one in operations if one.name in names}


def test_d12_a_network_multiplies_in_half_precision_and_interpolates_pools_and_scores_in_float32(cases: Cases) -> None:
    for name in ("upernet", "ppm", "c1"):
        step = cases[f"step of {name}"]
        assert types_of(step, "convolution") == {(HALF, HALF)}
        assert types_of(step, "native_batch_norm") == {(f"{HALF} {SINGLE}", f"{HALF} {SINGLE}")}
        assert types_of(step, "_log_softmax", "nll_loss2d_forward", "sum") - {("", "")} == {(SINGLE, SINGLE)}
        if name != "c1":
            assert types_of(step, "upsample_bilinear2d") == {(SINGLE, SINGLE)}
            assert types_of(step, "mm", "bmm") == {(SINGLE, SINGLE)}  # means of grid cells


def test_maps_are_concatenated_in_the_type_in_which_they_are_convolved(cases: Cases) -> None:
    joined = [one for one in cases["step of upernet"] if one.name == "cat" and "normalise" not in one.where]
    assert {one.where for one in joined} >= {"nets/upsampled_conv.py:forward"}
    assert types_of(joined, "cat") == {(HALF, HALF)}


def test_d12_the_factored_way_interpolates_and_adds_up_in_float32(cases: Cases) -> None:
    step = [one for one in cases["step of upernet, factored"] if one.where.startswith("nets/upsampled_conv.py")]
    functions = ("mix_channels", "interpolation_matrices", "add_products")
    inner = [one for one in step if one.where.endswith(functions)]
    assert {HALF} & {types for one in inner for types in (one.arguments, one.results)} == set()
    assert types_of(step, "add_") == {(SINGLE, SINGLE)}  # the sum over maps
    finest = [one for one in step if one.where.endswith("conv_of_maps")]
    assert types_of(finest, "convolution") == {(HALF, HALF)}


def test_d12_losses_see_logits_in_float32_only(cases: Cases) -> None:
    in_half = [one for one in select(cases, "loss") if HALF in (one.arguments, one.results)]
    assert set(in_half) == {Operation("_to_copy", HALF, SINGLE, "nets/blocks.py:cast")}


def test_d12_scales_are_merged_in_float32(cases: Cases) -> None:
    merging = [one for one in cases["evaluation"] if one.where.startswith("evaluation/")]
    in_half = [one for one in cases["evaluation"] if HALF in (one.arguments, one.results)]
    assert Operation("_to_copy", HALF, SINGLE, "nets/blocks.py:cast") in in_half  # of the logits
    assert not set(in_half) & set(merging)
    assert types_of(merging, "_softmax", "index_select") == {(SINGLE, SINGLE)}
    assert types_of(cases["evaluation"], "convolution") == {(HALF, HALF)}


def test_d12_the_moving_average_is_float32(cases: Cases) -> None:
    assert {one.results for one in cases["moving average"]} <= {SINGLE, ""}


def test_d12_the_backward_pass_has_the_types_of_the_forward_pass(cases: Cases) -> None:
    """Weights, gradients and statistics are float32: the program asserts it."""
    for name in ("upernet", "upernet, factored"):
        step, both = cases[f"step of {name}"], cases[f"backward of {name}"]
        compared = ("convolution", "upsample_bilinear2d", "mm", "bmm", "baddbmm_", "_log_softmax", "cat", "add", "add_")
        forward = [one for one in both if one.where != "backward" and one.name in compared]
        assert set(forward) == {one for one in step if one.name in compared}  # the device has CUDA's rules
        backward = [one for one in both if one.where == "backward"]
        gradients = {"upsample_bilinear2d_backward", "_log_softmax_backward_data", "nll_loss2d_backward", "mm", "bmm"}
        assert types_of(backward, *gradients) == {(SINGLE, SINGLE)}
        factored = {(SINGLE, SINGLE)} if "factored" in name else set()  # channels are mixed in float32 there
        assert types_of(backward, "convolution_backward") == {(HALF, HALF)} | factored
        assert types_of(backward, "native_batch_norm_backward") == {(f"{HALF} {SINGLE}", f"{HALF} {SINGLE}")}


def test_d12_synchronised_statistics_are_float32(cases: Cases) -> None:
    layers = [one for one in cases["backward of ppm, published statistics"] if one.where.startswith("syncbn/")]
    assert types_of(layers, "var_mean", "sum", "lerp_") == {(SINGLE, SINGLE)}
    assert {one.results for one in layers if one.where.endswith(("_update_running", "_centre_and_scale"))} <= {
        SINGLE,
        "",
    }


@pytest.mark.long
def test_d12_every_ready_network_keeps_these_rules(tmp_path: Path) -> None:
    steps = {name: step for name, step in run_program(tmp_path, "all").items() if name.startswith("step of model")}
    assert len(steps) > 15
    for name, step in steps.items():
        assert types_of(step, "convolution", "addmm") == {(HALF, HALF)}, name
        in_single = ("_log_softmax", "nll_loss2d_forward", "_softmax", "native_layer_norm", "upsample_bilinear2d")
        assert types_of(step, *in_single) == {(SINGLE, SINGLE)}, name

"""Several processes with different numbers of values compute what one process computes on all values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import CASES, CHANNELS, STEPS, SUBSET, Case, Trained, trained
from torch import Tensor, nn

from helpers.reference import golden
from semseg.syncbn.layer import PUBLISHED_MOMENTUM

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ONE_VALUE = "one value in all"


def values(x: Tensor) -> Tensor:
    """(N, C, ...) -> (values, C)."""
    return x.movedim(1, -1).reshape(-1, CHANNELS)


class Reference(nn.Module):
    """The rules of syncbn.json for the `published` convention, by autograd, on all values at once."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps
        self.tmp_mean, self.tmp_var = torch.stack([torch.zeros(CHANNELS), torch.ones(CHANNELS)]).double()
        self.iteration = 1.0

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, 0, correction=0)
        keep = 1 - PUBLISHED_MOMENTUM
        self.iteration = keep * self.iteration + 1
        self.tmp_mean = keep * self.tmp_mean + mean.detach()
        self.tmp_var = keep * self.tmp_var + x.detach().var(0)
        return (x - mean) * var.clamp(min=self.eps) ** -0.5 * self.weight + self.bias

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "running_mean": self.tmp_mean / self.iteration,
            "running_var": self.tmp_var / self.iteration,
            "num_batches_tracked": torch.tensor(STEPS),
        }


def in_one_process(case: Case, ranks: range, dtype: torch.dtype) -> Trained:
    """The case on the values of all ranks in one tensor (values, C), by torch's own layer."""
    plain = case.layer().to(dtype)
    layer: nn.Module = nn.BatchNorm1d(CHANNELS, **case.options).to(dtype)
    layer.load_state_dict(plain.state_dict())
    if case.convention == "published":
        layer = Reference(plain)
    outputs, input_grads = [], []
    for step in range(STEPS):
        pairs = [case.tensors(step, rank) for rank in ranks]
        x = torch.cat([values(x) for x, _ in pairs]).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.cat([values(grad) for _, grad in pairs]).to(dtype))
        outputs.append(y.detach())
        input_grads.append(x.grad)
    weight, bias = layer.weight, layer.bias
    return Trained(outputs, input_grads, *(None if p is None else p.grad for p in (weight, bias)), layer.state_dict())


def assert_equal(ranks: list[Trained], expected: Trained, tolerance: float) -> None:
    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)

    for step in range(STEPS):
        check(torch.cat([values(rank.outputs[step]) for rank in ranks]), expected.outputs[step])
        check(torch.cat([values(rank.input_grads[step]) for rank in ranks]), expected.input_grads[step])
    if expected.weight_grad is not None and expected.bias_grad is not None:
        check(sum(rank.weight_grad for rank in ranks), expected.weight_grad)
        check(sum(rank.bias_grad for rank in ranks), expected.bias_grad)
    for rank in ranks:
        for key in rank.state.keys() & {"running_mean", "running_var", "num_batches_tracked"}:
            check(rank.state[key], expected.state[key])


def names(world: int, choose: Callable[[Case], bool]) -> list[tuple[int, Case]]:
    return [(world, case) for case in CASES[world] if choose(case)]


EXACT = [
    *names(2, lambda case: case.dtype in TOLERANCE and case.offset == 0 and ONE_VALUE not in case.name),
    *names(3, lambda case: True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), EXACT, ids=[f"{world} ranks, {case.name}" for world, case in EXACT])
def test_ranks_together_equal_one_process(world: int, case: Case) -> None:
    results = [rank[case.name] for rank in trained(world)]
    assert_equal(results, in_one_process(case, range(world), case.dtype), TOLERANCE[case.dtype])


def named(name: str) -> tuple[Case, list[Trained]]:
    return next(case for case in CASES[2] if case.name == name), [rank[name] for rank in trained(2)]


@pytest.mark.parametrize("name", ["float32, mean 1e4", "channels last, mean 1e4"])
def test_a_mean_of_1e4_leaves_the_variance_exact_to_2e_5(name: str) -> None:
    case, ranks = named(name)
    exact = in_one_process(case, range(2), torch.float64)
    for rank in ranks:
        # What is left is the rounding of each rank's mean, 5e-4 at 1e4. Sums of squares would be off by about 1.
        torch.testing.assert_close(rank.state["running_var"].double(), exact.state["running_var"], rtol=2e-5, atol=0)
    # float32 numbers around 1e4 lie 1e-3 apart, and no kernel of torch does better than that on them.
    for step in range(STEPS):
        output = torch.cat([values(rank.outputs[step]) for rank in ranks]).double()
        torch.testing.assert_close(output, exact.outputs[step], rtol=0, atol=4e-3)


@pytest.mark.parametrize(("name", "resolution"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_half_precision_has_statistics_of_full_precision(name: str, resolution: float) -> None:
    case, ranks = named(name)
    exact = in_one_process(case, range(2), torch.float64)
    for rank in ranks:
        assert rank.outputs[0].dtype == rank.input_grads[0].dtype == case.dtype
        assert rank.weight_grad.dtype == torch.float32
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(rank.state[key].double(), exact.state[key], rtol=1e-5, atol=1e-5)
    for step in range(STEPS):
        for actual, expected in [
            ([rank.outputs[step] for rank in ranks], exact.outputs[step]),
            ([rank.input_grads[step] for rank in ranks], exact.input_grads[step]),
        ]:
            merged = torch.cat([values(x) for x in actual]).double()
            torch.testing.assert_close(merged, expected, rtol=resolution, atol=resolution)


@pytest.mark.parametrize("name", ["channels last", "published, channels last"])
def test_channels_last_stays_channels_last(name: str) -> None:
    for rank in named(name)[1]:
        for tensor in rank.outputs + rank.input_grads:
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [ONE_VALUE, f"{ONE_VALUE}, published"])
def test_a_single_value_is_normalised_by_the_running_statistics_which_stay(name: str) -> None:
    case, ranks = named(name)
    inv_std = (1 + case.layer().eps) ** -0.5  # running statistics are 0 and 1
    for step in range(STEPS):
        x, grad = case.tensors(step, 0)
        weight, bias = (p.detach().view(-1, 1, 1) for p in (case.layer().weight, case.layer().bias))
        torch.testing.assert_close(ranks[0].outputs[step], x * inv_std * weight + bias)
        torch.testing.assert_close(ranks[0].input_grads[step], grad * inv_std * weight)
    for rank in ranks:
        assert rank.state["num_batches_tracked"] == 0
        assert torch.equal(rank.state["running_var"], torch.ones(CHANNELS, dtype=torch.float64))


def test_a_single_value_without_running_statistics_is_a_clear_error_on_every_rank() -> None:
    assert all("one value per channel over all ranks" in rank["message"] for rank in trained(2))


@pytest.mark.parametrize("name", golden("syncbn.json")["cases"])
def test_two_ranks_give_the_numbers_of_the_2018_code(name: str) -> None:
    case = golden("syncbn.json")["cases"][name]
    for rank, result in enumerate(rank["golden"][name] for rank in trained(2)):
        for actual, expected in zip(result, case["steps"], strict=True):
            close(actual["output"], expected["output"][rank])
            close(actual["input_grad"], expected["input_grad"][rank])
            if name != "statistics_loaded_without_the_bookkeeping":
                close(actual["running_mean"], expected["running_mean"])
                close(actual["running_var"], expected["running_var"])
        if rank == 0 and name != "statistics_loaded_without_the_bookkeeping":
            close(result[-1]["evaluated"], case["eval_output_device0_step0"])
    for step, expected in enumerate(case["steps"]):
        for gradient in ("weight_grad", "bias_grad"):
            close(sum(rank["golden"][name][step][gradient] for rank in trained(2)), expected[gradient])


def test_statistics_loaded_without_a_step_count_are_kept_where_the_2018_code_forgot_them() -> None:
    name = "statistics_loaded_without_the_bookkeeping"
    case = golden("syncbn.json")["cases"][name]
    for statistic, batch in [("running_mean", "mean"), ("running_var", "unbiased_var")]:
        running = torch.tensor(case["initial"][statistic], dtype=torch.float64)
        for actual, step in zip(trained(2)[0]["golden"][name], case["steps"], strict=True):
            running += (torch.tensor(step[batch], dtype=torch.float64) - running) / 1000
            close(actual[statistic], running.tolist())


def close(actual: Tensor, expected: list) -> None:
    """The golden numbers have 12 digits, and a channel with a variance below eps magnifies those of its inputs."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_ranks_may_evaluate_different_numbers_of_batches() -> None:
    assert all(rank["evaluation"] for rank in trained(2))


def test_a_process_group_reduces_over_its_own_ranks() -> None:
    first, second, alone = (rank["subset"] for rank in trained(3))
    assert_equal([first, second], in_one_process(SUBSET, range(2), torch.float64), 1e-10)
    assert_equal([alone], in_one_process(SUBSET, range(2, 3), torch.float64), 1e-10)

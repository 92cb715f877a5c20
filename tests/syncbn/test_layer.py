"""The layers in one process: both conventions, conversion there and back, state dicts new and old."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg.errors import ConfigError
from semseg.syncbn import reduce
from semseg.syncbn.layer import (
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    convert_batch_norms,
    iteration_weight,
    revert_batch_norms,
    steady_steps,
    steps_at_weight,
)

CHANNELS = 3


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass with a method of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def answer(self) -> int:
        return 42


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: dropout and activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def network() -> nn.Sequential:
    shared = nn.BatchNorm2d(CHANNELS)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1), shared, nn.Sequential(OwnBatchNorm(CHANNELS), shared), BatchNormAct(CHANNELS)
    )


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (2, CHANNELS, 4, 5), generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("convention", ["torch", "published"])
@pytest.mark.parametrize(
    ("kernels", "size"), [("cpu", (4, 5)), ("portable", (4, 5)), ("cpu", (3,)), ("cpu", (2, 2, 3))]
)
def test_gradients_are_those_of_finite_differences(
    convention: str, kernels: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "portable":
        monkeypatch.setattr(reduce, "KERNELS", {})
    kind = {1: SyncBatchNorm1d, 2: SyncBatchNorm2d, 3: SyncBatchNorm3d}[len(size)]
    layer = kind(CHANNELS, eps=0.05, convention=convention, track_running_stats=False, dtype=torch.float64)
    x = image(2, CHANNELS, *size)
    x[:, 0] *= 0.1  # variance 0.01, below eps
    x.requires_grad_()
    weight, bias = (p.detach().clone().uniform_(0.5, 2).requires_grad_() for p in (layer.weight, layer.bias))

    def outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(_Reduced(layer), {"layer.weight": weight, "layer.bias": bias}, (x,))

    assert torch.autograd.gradcheck(outputs, (x, weight, bias))


class _Reduced(nn.Module):
    """The reduction even where one process would leave it to torch."""

    def __init__(self, layer: SyncBatchNorm1d | SyncBatchNorm2d | SyncBatchNorm3d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.normalise_over(x, None)


@pytest.mark.parametrize(("eps", "gradient"), [(1.0, 0.0), (1.0001, 0.5)])
def test_the_gradient_through_the_variance_stops_below_eps_and_not_at_it(eps: float, gradient: float) -> None:
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).requires_grad_()  # variance 1
    SyncBatchNorm2d(1, eps=eps, convention="published")(x)[0].sum().backward()
    torch.testing.assert_close(x.grad[0].squeeze(), torch.tensor(gradient), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_one_process_in_the_torch_convention_is_nn_batchnorm_to_the_bit(options: dict[str, Any]) -> None:
    plain, synced = nn.BatchNorm2d(CHANNELS, **options), SyncBatchNorm2d(CHANNELS, **options)
    for training in (True, True, False):
        x = image(dtype=torch.float32)
        assert torch.equal(plain.train(training)(x), synced.train(training)(x))
    assert plain.state_dict().keys() == synced.state_dict().keys()
    assert all(torch.equal(value, synced.state_dict()[key]) for key, value in plain.state_dict().items())


def test_one_process_in_the_published_convention_clamps_in_training_and_adds_in_evaluation() -> None:
    layer = SyncBatchNorm2d(1, eps=4.0, convention="published")
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)  # variance 1, unbiased 2
    torch.testing.assert_close(layer(x), x / 2)  # max(1, 4)
    torch.testing.assert_close(layer.running_var, torch.tensor([1 + (2 - 1) / 1.999]))
    layer.running_var.fill_(5.0)
    torch.testing.assert_close(layer.eval()(x), x / 3)  # 5 + 4


@pytest.mark.parametrize("convention", ["torch", "published"])
def test_frozen_layers_stay_as_they_are(convention: str) -> None:
    layer = convert_batch_norms(nn.BatchNorm2d(CHANNELS).eval(), convention)
    assert not layer.training
    layer(image(dtype=torch.float32))
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert layer.num_batches_tracked == 0


def test_a_single_value_in_one_process_is_normalised_by_the_running_statistics() -> None:
    layer = SyncBatchNorm2d(CHANNELS)
    layer.running_mean.fill_(1.0)
    x = torch.full((1, CHANNELS, 1, 1), 3.0)
    torch.testing.assert_close(layer(x), torch.full_like(x, 2 / (1 + 1e-5) ** 0.5))
    assert torch.equal(layer.running_mean, torch.ones(CHANNELS))
    with pytest.raises(ValueError, match="one value per channel over all ranks"):
        SyncBatchNorm2d(CHANNELS, track_running_stats=False)(x)


def test_wrong_number_of_dimensions_is_refused_as_by_nn_batchnorm() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        SyncBatchNorm2d(CHANNELS, convention="published")(torch.zeros(2, CHANNELS, 4))


# Conversion.


def test_convert_keeps_everything_but_the_class_and_revert_brings_that_back() -> None:
    net = network()
    net[1].eval()
    calls: list[str] = []
    net[1].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: (type(m), m.training, [id(t) for t in m.parameters()]) for name, m in net.named_modules()}
    tensors = {key: value.data_ptr() for key, value in net.state_dict().items()}

    assert convert_batch_norms(net) is net
    assert all(hasattr(m, "rule") for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert type(net[1]) is SyncBatchNorm2d
    assert isinstance(net[2][0], OwnBatchNorm)
    assert net[2][0].answer() == 42
    assert not isinstance(net[1], nn.SyncBatchNorm)
    assert net[1] is net[2][1]
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == tensors
    net(image(dtype=torch.float32))
    assert calls == ["hook", "hook"]

    revert_batch_norms(net)
    assert {n: (type(m), m.training, [id(t) for t in m.parameters()]) for n, m in net.named_modules()} == before
    assert not any(hasattr(m, "rule") or hasattr(m, "plain_class") for m in net.modules())


def test_a_layer_that_holds_its_activation_keeps_it() -> None:
    layer = convert_batch_norms(BatchNormAct(CHANNELS), "published")
    assert layer(image(dtype=torch.float32)).min() == 0


def test_converting_again_changes_the_rule_only() -> None:
    layer = convert_batch_norms(convert_batch_norms(OwnBatchNorm(CHANNELS)), "published")
    assert layer.rule.is_published
    assert type(revert_batch_norms(layer)) is OwnBatchNorm


def test_a_converted_network_can_be_copied() -> None:
    net = convert_batch_norms(network(), "published")
    twin = copy.deepcopy(net)
    assert type(twin[2][0]) is type(net[2][0])
    assert twin[1].rule == net[1].rule


@pytest.mark.parametrize(
    ("options", "message"),
    [({"convention": "publishd"}, "Did you mean published"), ({"momentum": 1.0}, "above 0 and below 1")],
)
def test_wrong_rules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_batch_norms(nn.BatchNorm2d(1), **options)


def test_lazy_layers_must_be_initialised_first() -> None:
    with pytest.raises(ConfigError, match="Run the network once"):
        convert_batch_norms(nn.LazyBatchNorm2d())


# State dicts.


@pytest.mark.parametrize("target", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d])
@pytest.mark.parametrize("source", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d])
def test_state_dicts_move_freely(source: type[nn.Module], target: type[nn.Module]) -> None:
    original, copied = source(CHANNELS), target(CHANNELS)
    original.running_mean.fill_(3.0)
    original.num_batches_tracked.fill_(7)
    copied.load_state_dict(original.state_dict())
    assert copied.running_mean[0] == 3
    assert copied.num_batches_tracked == 7
    assert copied.state_dict().keys() == original.state_dict().keys()


def test_the_published_average_survives_a_checkpoint() -> None:
    straight, first, second = (SyncBatchNorm2d(CHANNELS, convention="published") for _ in range(3))
    x = image(dtype=torch.float32)
    for _ in range(3):
        straight(x)
    first(x)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second(x)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in straight.state_dict().items())


def test_iteration_weight_is_the_recurrence() -> None:
    iteration = 1.0
    for steps in range(1, 50):
        iteration = 0.999 * iteration + 1
        assert iteration_weight(torch.tensor(steps, dtype=torch.float64), 0.001).item() == pytest.approx(iteration)
        assert iteration_weight(torch.tensor(float(steps)), 0.001).item() == pytest.approx(iteration, rel=1e-6)
        assert steps_at_weight(iteration, 0.001) == steps
    assert steps_at_weight(1000.0, 0.001) == steady_steps(0.001)
    assert iteration_weight(torch.tensor(steady_steps(0.001), dtype=torch.float64), 0.001) == 1000


def old_file(*buffers: str, steps: int = 2) -> dict[str, Tensor]:
    """A layer as the 2018 code saved it after `steps` steps, with some of its own buffers."""
    iteration = iteration_weight(torch.tensor(float(steps), dtype=torch.float64), 0.001).float()
    mean, var = torch.full((CHANNELS,), 0.5), torch.full((CHANNELS,), 2.0)
    extra = {
        "_tmp_running_mean": mean * iteration,
        "_tmp_running_var": var * iteration,
        "_running_iter": iteration.view(1),
        "num_batches_tracked": torch.tensor(0),
    }
    plain = {"weight": torch.ones(CHANNELS), "bias": torch.zeros(CHANNELS), "running_mean": mean, "running_var": var}
    return plain | {name: extra[name] for name in buffers}


TMP = ("_tmp_running_mean", "_tmp_running_var")


@pytest.mark.parametrize(
    ("buffers", "steps"),
    [
        ((), steady_steps(0.001)),
        (TMP, steady_steps(0.001)),
        ((*TMP, "num_batches_tracked"), steady_steps(0.001)),
        ((*TMP, "_running_iter"), 2),
        ((*TMP, "_running_iter", "num_batches_tracked"), 2),
    ],
)
def test_files_of_the_2018_code_load_with_none_two_or_three_of_its_buffers(
    buffers: tuple[str, ...], steps: int
) -> None:
    net = nn.Sequential(SyncBatchNorm2d(CHANNELS, convention="published"))
    net.load_state_dict({f"0.{key}": value for key, value in old_file(*buffers).items()})
    assert net[0].num_batches_tracked == steps


def test_loaded_statistics_are_not_forgotten_by_the_first_step() -> None:
    layer = SyncBatchNorm2d(CHANNELS, convention="published")
    layer.load_state_dict(old_file())
    layer(image(dtype=torch.float32) + 100)
    torch.testing.assert_close(layer.running_mean, torch.full((CHANNELS,), 0.6), atol=0.01, rtol=0)


def test_fresh_layers_stay_fresh() -> None:
    assert convert_batch_norms(nn.BatchNorm2d(CHANNELS), "published").num_batches_tracked == 0


# The CUDA kernels.


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_kernels_equal_the_portable_ones(dtype: torch.dtype, channels_last: bool) -> None:
    x = image(4, CHANNELS, 8, 9).cuda().to(dtype)
    dy = image(4, CHANNELS, 8, 9).flip(0).cuda().to(dtype)
    if channels_last:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)

    def check(name: str, *arguments: Any, **keywords: Any) -> Any:
        actual, expected = (
            getattr(k, name)(*arguments, **keywords) for k in (reduce.CudaKernels, reduce.PortableKernels)
        )
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        return expected

    mean, m2 = check("moments", x)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    inv_std = (m2 / (x.numel() // CHANNELS) + 1e-5).rsqrt()
    scale, shift = torch.linspace(0.5, 2, CHANNELS).to(mean), torch.linspace(-1, 1, CHANNELS).to(mean)
    y = check("normalise", x, mean, inv_std, scale, shift)
    assert y.stride() == reduce.CudaKernels.normalise(x, mean, inv_std, scale, shift).stride()
    sums = check("grad_sums", dy, x, mean, inv_std)
    mean_dy, mean_dy_x_hat = (s / (x.numel() // CHANNELS) for s in sums)
    check("grad_x", dy, x, mean, inv_std, scale=scale, mean_dy=mean_dy, mean_dy_x_hat=mean_dy_x_hat)


@pytest.mark.gpu
@pytest.mark.parametrize("convention", ["torch", "published"])
@pytest.mark.parametrize("size", [(), (7,), (4, 5), (2, 3, 4)])
def test_a_step_on_cuda_equals_one_on_the_cpu(convention: str, size: tuple[int, ...]) -> None:
    kind = {0: SyncBatchNorm1d, 1: SyncBatchNorm1d, 2: SyncBatchNorm2d, 3: SyncBatchNorm3d}[len(size)]
    on_cpu = kind(CHANNELS, convention=convention, dtype=torch.float64)
    on_cuda = copy.deepcopy(on_cpu).cuda()
    results = []
    for layer in (on_cpu, on_cuda):
        x = image(6, CHANNELS, *size)
        x[:, 0] *= 1e-4  # below eps
        x = x.to(layer.weight.device).requires_grad_()
        y = layer.normalise_over(x, None)
        y.square().sum().backward()
        found = [y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
        results.append([tensor.detach().cpu() for tensor in found])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_empty_and_constant_values_on_cuda() -> None:
    layer = SyncBatchNorm2d(CHANNELS, convention="published").cuda()
    empty = torch.zeros(0, CHANNELS, 4, 4, device="cuda", requires_grad=True)
    layer.normalise_over(empty, None).sum().backward()
    assert layer.num_batches_tracked == 0
    assert layer.normalise_over(torch.ones(2, CHANNELS, 4, 4, device="cuda"), None).abs().max() == 0

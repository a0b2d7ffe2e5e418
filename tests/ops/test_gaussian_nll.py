"""``fastwm.gaussian_nll`` against the formulas of PETS and MBPO, and its own reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.ops import cpu_library, gaussian_nll, gaussian_nll_reference
from fastwm.tolerances import tolerance
from tests.losses import (
    assert_gradients_near,
    assert_loss_near,
    at_one_and_two_threads,
    gradients,
)

SHAPES = ((1, 1), (3, 17), (17, 3), (200, 129), (2, 70, 5), (7,))
DTYPES = (torch.float32, torch.float64)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Log-variances within the bounds and far beyond either."""
    mean, logvar, target = torch.randn(3, *shape, dtype=dtype)
    high, low = torch.rand(2, shape[-1], dtype=dtype)
    return mean, 6 * logvar, target, 0.5 + high, -3 - low


def by_hand(mean: Tensor, logvar: Tensor, target: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The formulas of the papers, term by term."""
    logvar = high - torch.nn.functional.softplus(high - logvar)
    logvar = low + torch.nn.functional.softplus(logvar - low)
    return ((mean - target) ** 2 * torch.exp(-logvar) + logvar).sum(-1)


def rounding(*inputs: Tensor) -> float:
    """What a sum may be off whose terms have either sign: relative to their sizes, not to it."""
    mean, logvar, target, high, low = inputs
    zero = torch.zeros_like(target)
    size = by_hand(mean, logvar, target, high, low) - by_hand(zero, logvar, zero, high, low)
    size = size + torch.maximum(high.abs(), low.abs()).sum()
    return tolerance("loss", mean.dtype).rtol * size.max().item()


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("gaussian_nll", "gaussian_nll_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, nan_filled: None, each_isa: str
) -> None:
    inputs = make(shape, dtype)
    assert_loss_near(gaussian_nll(*inputs), by_hand(*inputs), rounding(*inputs))
    assert_gradients_near(gradients(gaussian_nll, inputs), gradients(by_hand, inputs))


def test_the_bounds_hold() -> None:
    """With no error, the loss is the bounded log-variance."""
    mean, far = torch.zeros(2, 1), torch.tensor([[-1e3], [1e3]])
    loss = gaussian_nll(mean, far, mean, torch.tensor([0.5]), torch.tensor([-10.0]))
    torch.testing.assert_close(loss - 1, torch.tensor([-11.0, -0.5]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bounds", ["per feature", "one row", "scalar", "per member"])
def test_bounds_of_any_shape_that_expands(bounds: str) -> None:
    mean, logvar, target, high, low = make((4, 6, 5), torch.float64)
    high, low = {
        "per feature": (high, low),
        "one row": (high.view(1, 5), low.view(1, 1, 5)),
        "scalar": (high[0], low[:1]),
        "per member": (high + torch.rand(4, 1, 1).double(), low - torch.rand(4, 1, 5).double()),
    }[bounds]
    inputs = (mean, logvar, target, high, low)
    assert_loss_near(gaussian_nll(*inputs), by_hand(*inputs), 1e-12)
    assert_gradients_near(gradients(gaussian_nll, inputs), gradients(by_hand, inputs))


def test_gradcheck_and_second_derivatives() -> None:
    inputs = tuple(x.requires_grad_() for x in make((3, 4), torch.float64))
    assert torch.autograd.gradcheck(gaussian_nll, inputs)
    assert torch.autograd.gradgradcheck(gaussian_nll, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = make((3, 4), dtype)
    backward = torch.ops.fastwm.gaussian_nll_backward
    torch.library.opcheck(backward, (torch.randn(3, dtype=dtype), *inputs))
    leaves = tuple(x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.fastwm.gaussian_nll, leaves)


def test_strided_input(nan_filled: None) -> None:
    inputs = make((6, 4, 9))
    strided = tuple(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs[:3])
    wide = torch.zeros(2, 18)
    wide[:, ::2] = torch.stack(inputs[3:])
    strided = (*strided, *wide[:, ::2])
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(gaussian_nll(*strided), gaussian_nll(*inputs))
    assert_gradients_near(gradients(gaussian_nll, strided), gradients(by_hand, inputs))


def test_expanded_target_and_gradient() -> None:
    """One target for an ensemble, and the gradient of a sum."""
    mean, logvar, target, *bounds = make((3, 7, 4))
    mean.requires_grad_()
    shared = target[0].expand(3, 7, 4)
    gaussian_nll(mean, logvar, shared, *bounds).sum().backward()
    actual, mean.grad = mean.grad, None
    by_hand(mean, logvar, shared, *bounds).sum().backward()
    assert_gradients_near([actual], [mean.grad])


def test_nan_stays_in_its_row_and_in_its_features_bound() -> None:
    inputs = make((4, 20))
    inputs[0][1, 17] = torch.nan
    assert gaussian_nll(*inputs).isnan().tolist() == [False, True, False, False]
    to_mean, _, _, to_high, to_low = gradients(gaussian_nll, inputs)
    assert to_mean.isnan().nonzero().tolist() == [[1, 17]]
    assert to_high.isnan().nonzero().tolist() == to_low.isnan().nonzero().tolist() == [[17]]


def test_threads_do_not_change_the_result() -> None:
    """The bounds' gradients are sums over all rows."""
    inputs = make((3000, 9), torch.float64)  # in float32 the last rounding would hide it
    run = lambda: [gaussian_nll(*inputs), *gradients(gaussian_nll, inputs)]  # noqa: E731
    torch.testing.assert_close(*at_one_and_two_threads(run), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_zero_rows(shape: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in make(shape)]
    out = gaussian_nll(*inputs)
    assert out.shape == shape[:-1]
    out.sum().backward()
    assert inputs[0].grad.shape == shape
    assert inputs[3].grad.tolist() == inputs[4].grad.tolist() == [0.0] * 5


def test_no_features() -> None:
    assert gaussian_nll(*make((3, 0))).tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype: torch.dtype) -> None:
    inputs = tuple(x.to(dtype) for x in make((5, 9)))
    actual = gaussian_nll(*inputs)
    assert actual.dtype == dtype
    assert torch.equal(actual, gaussian_nll_reference(*inputs))


def test_torch_func() -> None:
    mean, *rest = make((4, 9))
    loss = lambda x: gaussian_nll(x, *rest).square().sum()  # noqa: E731
    leaf = mean.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(mean), leaf.grad)


def test_compiles_without_a_graph_break() -> None:
    mean, *rest = make((4, 9))
    mean.requires_grad_()
    compiled = torch.compile(
        lambda x: gaussian_nll(x * 2, *rest), fullgraph=True, backend="aot_eager"
    )
    out = compiled(mean)
    out.sum().backward()
    actual, mean.grad = mean.grad, None
    expected = gaussian_nll(mean * 2, *rest)
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(actual, mean.grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logvar": torch.zeros(3, 1)}, ValueError, ["logvar", "[3, 4]", "[3, 1]"]),
        ({"target": torch.zeros(4)}, ValueError, ["target", "[3, 4]", "[4]"]),
        ({"max_logvar": torch.zeros(3)}, ValueError, ["max_logvar", "[3, 4]", "[3]"]),
        ({"min_logvar": torch.zeros(1, 3, 4)}, ValueError, ["min_logvar", "[3, 4]", "[1, 3, 4]"]),
        ({"mean": torch.zeros(())}, ValueError, ["mean", "[]"]),
        ({"target": torch.zeros(3, 4, dtype=torch.int)}, TypeError, ["target", "int32"]),
        ({"target": torch.zeros(3, 4, device="meta")}, RuntimeError, ["target", "meta", "cpu"]),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments = {name: torch.zeros(3, 4) for name in ("mean", "logvar", "target")}
    arguments |= {"max_logvar": torch.zeros(4), "min_logvar": torch.zeros(4)}
    with pytest.raises(error) as caught:
        gaussian_nll(**{**arguments, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    inputs = make((3, 5))
    op, backward = torch.ops.fastwm.gaussian_nll, torch.ops.fastwm.gaussian_nll_backward
    names = ("mean", "logvar", "target", "max_logvar", "min_logvar")
    for i, name in enumerate(names[1:], 1):
        for bad in (inputs[i][:2], inputs[i].double()):
            changed = (*inputs[:i], bad, *inputs[i + 1 :])
            with pytest.raises(RuntimeError, match=name):
                op(*changed)
            with pytest.raises(RuntimeError, match=name):
                backward(torch.ones(3), *changed)
    with pytest.raises(RuntimeError, match="grad"):
        backward(torch.ones(2), *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, nan_filled: None) -> None:
    inputs = tuple(x.cuda() for x in make(shape, dtype))
    expected = gaussian_nll_reference(*inputs)
    assert_loss_near(gaussian_nll(*inputs), expected, rounding(*inputs))
    assert_gradients_near(
        gradients(gaussian_nll, inputs), gradients(gaussian_nll_reference, inputs)
    )

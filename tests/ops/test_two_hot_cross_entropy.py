"""``fastwm.two_hot_cross_entropy`` against torchrl's function and the formulas of TD-MPC2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symlog
from torchrl.objectives import two_hot_cross_entropy as torchrl_two_hot_cross_entropy

from fastwm.ops import cpu_library, two_hot_cross_entropy, two_hot_cross_entropy_reference
from tests.losses import (
    assert_gradients_near,
    assert_loss_near,
    at_one_and_two_threads,
    gradients,
)

SHAPES = ((1, 2), (3, 17), (17, 3), (129, 129), (2, 5, 255), (7,))
DTYPES = (torch.float32, torch.float64)


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some of them on a bin or beyond all) and bins of uneven widths."""
    bins = torch.randn(shape[-1], dtype=dtype).sort().values
    target = 2 * torch.randn(shape[:-1], dtype=dtype)
    if target.numel() > 2:
        target.view(-1)[0], target.view(-1)[1], target.view(-1)[2] = bins[0], bins[-1], bins[1]
    return 3 * torch.randn(shape, dtype=dtype), target, bins


def evenly(logits: Tensor, target: Tensor, bins: tuple[float, float]) -> Tensor:
    """The pair form as torchrl's function computes it."""
    support = torch.linspace(*bins, logits.shape[-1], dtype=target.dtype)
    return torchrl_two_hot_cross_entropy(logits, symlog(target), support)


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("two_hot_cross_entropy", "two_hot_cross_entropy_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")


@pytest.mark.parametrize("form", ["bins", "pair"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torchrl(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, nan_filled: None, each_isa: str
) -> None:
    logits, target, bins = make(shape, dtype)
    ours, theirs = two_hot_cross_entropy, torchrl_two_hot_cross_entropy
    if form == "pair":
        bins, theirs = (-0.9, 1.3), evenly
    # The place in symlog space is rounded at its size, which is many bins: that much of a bin, times
    # the difference of two logits, is what the loss may be off besides.
    spread = (logits.max() - logits.min()).item()
    off = torch.finfo(dtype).eps * 1.3 / (2.2 / (shape[-1] - 1)) * spread if form == "pair" else 0.0
    assert_loss_near(ours(logits, target, bins), theirs(logits, target, bins), off)
    assert_gradients_near(
        gradients(lambda *x: ours(*x, bins), (logits, target)),
        gradients(lambda *x: theirs(*x, bins), (logits, target)),
    )


def test_dreamer_v3s_own_bins() -> None:
    two_hot = SymExpTwoHot()
    logits, target = torch.randn(33, 255), torch.randn(33, 1) * 1e3
    actual = two_hot_cross_entropy(logits, target, two_hot.bins)
    assert_loss_near(actual, two_hot.loss(logits, target))


def test_td_mpc2s_formulas() -> None:
    """``soft_ce`` and ``two_hot`` of TD-MPC2, written down from its description: the floor of the
    place on an even grid in symlog space."""
    low, high, n = -10.0, 10.0, 101
    logits, target = torch.randn(64, n), torch.randn(64) * 100
    at = (symlog(target).clamp(low, high) - low) / ((high - low) / (n - 1))
    index = at.floor().long()
    encoded = torch.zeros(64, n).scatter(1, index[:, None], 1 - (at - index)[:, None])
    encoded = encoded.scatter(1, (index[:, None] + 1) % n, (at - index)[:, None])
    expected = -(encoded * logits.log_softmax(-1)).sum(-1)
    # The place on the grid is rounded at 50 and not at 1: 4e-6 of a bin.
    actual = two_hot_cross_entropy(logits, target, (low, high))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["bins", "pair"])
def test_gradcheck_and_second_derivatives(form: str) -> None:
    """Targets inside, outside and between bins, none at a kink."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([-3.0, -0.6, 0.1, 0.4, 5.0], dtype=torch.float64, requires_grad=True)
    support = torch.tensor([-1.0, -0.2, 0.3, 1.0], dtype=torch.float64)
    bins: Any = support if form == "bins" else (-1.0, 1.0)
    assert torch.autograd.gradcheck(lambda *x: two_hot_cross_entropy(*x, bins), (logits, target))
    assert torch.autograd.gradgradcheck(
        lambda *x: two_hot_cross_entropy(*x, bins), (logits, target)
    )  # fmt: skip


def test_gradient_of_a_target_of_zero_in_symlog_space() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64)
    target = torch.zeros(2, dtype=torch.float64)
    got = gradients(lambda t: two_hot_cross_entropy(logits, t, (-1.0, 1.1)), (target,))
    want = gradients(lambda t: evenly(logits, t, (-1.0, 1.1)), (target,))
    assert want[0].abs().min() > 0
    assert_gradients_near(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target, bins = make((3, 4), dtype)
    grad = torch.randn(3, dtype=dtype)
    backward = torch.ops.fastwm.two_hot_cross_entropy_backward
    torch.library.opcheck(backward, (grad, logits, target, bins, True))
    leaves = (logits.requires_grad_(), target.requires_grad_(), bins, False)
    torch.library.opcheck(torch.ops.fastwm.two_hot_cross_entropy, leaves)


def test_strided_input(nan_filled: None) -> None:
    logits, target, bins = make((6, 4, 9))
    strided = (logits.transpose(0, 1).contiguous().transpose(0, 1), target.t().contiguous().t())
    wide = torch.zeros(18)
    wide[::2] = bins
    assert not any(x.is_contiguous() for x in (*strided, wide[::2]))
    actual = two_hot_cross_entropy(*strided, wide[::2])
    assert torch.equal(actual, two_hot_cross_entropy(logits, target, bins))
    assert_gradients_near(
        gradients(lambda *x: two_hot_cross_entropy(*x, wide[::2]), strided),
        gradients(lambda *x: torchrl_two_hot_cross_entropy(*x, bins), (logits, target)),
    )


def test_expanded_gradient() -> None:
    logits, target, bins = make((6, 9))
    logits.requires_grad_()
    two_hot_cross_entropy(logits, target, bins).sum().backward()  # a gradient of stride 0
    actual, logits.grad = logits.grad, None
    torchrl_two_hot_cross_entropy(logits, target, bins).sum().backward()
    assert_gradients_near([actual], [logits.grad])


def test_a_last_dimension_of_the_target() -> None:
    logits, target, bins = make((6, 4, 9))
    actual = two_hot_cross_entropy(logits, target.unsqueeze(-1), bins)
    assert torch.equal(actual, two_hot_cross_entropy(logits, target, bins))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0], [0.0, 0.0, -torch.inf]])
    target, bins = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0.0, 1.0, 2.0])
    actual = two_hot_cross_entropy(logits, target, bins)
    torch.testing.assert_close(actual, torch.tensor([1e4, 0.0, torch.tensor(2.0).log()]))


def test_nan_stays_in_its_row() -> None:
    logits, target, bins = make((4, 20))
    logits[0, 17], target[1] = torch.nan, torch.nan
    actual = two_hot_cross_entropy(logits, target, bins)
    assert actual.isnan().tolist() == [True, True, False, False]
    (grad,) = gradients(lambda x: two_hot_cross_entropy(x, target, bins), (logits,))
    assert grad.isnan().any(-1).tolist() == [True, True, False, False]


def test_threads_do_not_change_the_result() -> None:
    logits, target, bins = make((1000, 31))

    def run() -> list[Tensor]:
        function = lambda *x: two_hot_cross_entropy(*x, bins)  # noqa: E731
        return [function(logits, target), *gradients(function, (logits, target))]

    torch.testing.assert_close(*at_one_and_two_threads(run), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_zero_rows(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    out = two_hot_cross_entropy(logits, torch.zeros(shape[:-1]), (-1.0, 1.0))
    assert out.shape == shape[:-1]
    out.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype: torch.dtype) -> None:
    logits, target, bins = (x.to(dtype) for x in make((5, 9)))
    actual = two_hot_cross_entropy(logits, target, bins)
    assert actual.dtype == dtype
    expected = two_hot_cross_entropy(logits.float(), target.float(), bins.float())
    torch.testing.assert_close(actual.float(), expected, rtol=5e-2, atol=5e-2)


def test_mixed_dtypes_equal_torchrl() -> None:
    logits, target, bins = make((5, 9))
    actual = two_hot_cross_entropy(logits.double(), target, bins.double())
    expected = torchrl_two_hot_cross_entropy(logits.double(), target, bins.double())
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


def test_bins_that_require_a_gradient_get_one() -> None:
    logits, target, bins = make((5, 9), torch.float64)
    got = gradients(lambda b: two_hot_cross_entropy(logits, target, b), (bins,))
    want = gradients(lambda b: torchrl_two_hot_cross_entropy(logits, target, b), (bins,))
    assert want[0].abs().max() > 0
    assert_gradients_near(got, want)


def test_torch_func() -> None:
    logits, target, bins = make((4, 3, 9))
    loss = lambda x, y: two_hot_cross_entropy(x, y, bins).square().sum()  # noqa: E731
    got = torch.vmap(torch.func.grad(loss))(logits, target)
    for i in range(4):
        leaf = logits[i].clone().requires_grad_()
        loss(leaf, target[i]).backward()
        torch.testing.assert_close(got[i], leaf.grad)


def test_compiles_without_a_graph_break() -> None:
    logits, target, bins = make((4, 9))
    logits.requires_grad_()
    compiled = torch.compile(
        lambda x: two_hot_cross_entropy(x * 2, target, bins), fullgraph=True, backend="aot_eager"
    )
    out = compiled(logits)
    out.sum().backward()
    actual, logits.grad = logits.grad, None
    expected = two_hot_cross_entropy(logits * 2, target, bins)
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(actual, logits.grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": torch.zeros(4)}, ValueError, ["target", "[3, 5]", "[4]"]),
        ({"target": torch.zeros(3, 5)}, ValueError, ["target", "[3, 5]", "[3, 1]"]),
        ({"logits": torch.zeros(3, 1)}, ValueError, ["at least 2 bins", "[3, 1]"]),
        ({"logits": torch.zeros(())}, ValueError, ["at least 2 bins", "[]"]),
        ({"bins": torch.zeros(6)}, ValueError, ["bins", "[3, 5]", "[6]"]),
        ({"bins": (1.0, 1.0)}, ValueError, ["low < high", "(1.0, 1.0)"]),
        ({"logits": torch.zeros(3, 5, dtype=torch.int)}, TypeError, ["logits", "int32"]),
        ({"target": torch.zeros(3, dtype=torch.int)}, TypeError, ["target", "int32"]),
        ({"target": torch.zeros(3, device="meta")}, RuntimeError, ["target", "meta", "cpu"]),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3), "bins": (-1.0, 1.0)}
    with pytest.raises(error) as caught:
        two_hot_cross_entropy(**{**arguments, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    logits, target, bins = make((3, 5))
    op, backward = (
        torch.ops.fastwm.two_hot_cross_entropy,
        torch.ops.fastwm.two_hot_cross_entropy_backward,
    )
    for name, args in {
        "target": (logits, target[:2], bins, False),
        "bins": (logits, target, bins[:4], False),
        "logits": (logits[:, :1], target, bins[:1], False),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            op(*args)
        with pytest.raises(RuntimeError, match=name):
            backward(target, *args)
    with pytest.raises(RuntimeError, match="dtype"):
        op(logits, target.double(), bins, False)
    with pytest.raises(RuntimeError, match="grad"):
        backward(target[:2], logits, target, bins, False)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bins", "pair"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, form: str, nan_filled: None) -> None:
    logits, target, bins = (x.cuda() for x in make(shape, dtype))
    support: Any = bins if form == "bins" else (-0.9, 1.3)
    ours, reference = two_hot_cross_entropy, two_hot_cross_entropy_reference
    assert_loss_near(ours(logits, target, support), reference(logits, target, support))
    assert_gradients_near(
        gradients(lambda *x: ours(*x, support), (logits, target)),
        gradients(lambda *x: reference(*x, support), (logits, target)),
    )

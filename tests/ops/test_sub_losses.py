"""``fastwm.ops.sub_losses`` against torch's own losses, reduced as torchrl reduces them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrl.objectives.utils import distance_loss

from fastwm.ops import cpu_library, sub_losses, sub_losses_reference
from fastwm.ops.sub_losses import DISTANCES, why_not_in_kernel
from tests.losses import assert_gradients_near, assert_loss_near, at_one_and_two_threads

DTYPES = (torch.float32, torch.float64)
SHAPES = {
    "one": [(1,)],
    "four": [(17, 1), (17, 1), (17, 129), (17, 3)],
    "many": [(3, 5, 2), (0, 3), (), (40000,), (7,), (256,), (257,)],
}


def by_hand(
    predictions: list[Tensor],
    targets: list[Tensor],
    distances: list[str],
    weights: list[float],
    *,
    reduction: str = "mean",
    masks: list[Tensor] | None = None,
) -> list[Tensor]:
    losses = []
    for i, (x, y, name) in enumerate(zip(predictions, targets, distances, strict=True)):
        y = y.to(x.dtype)
        if name == "binary_cross_entropy":
            loss = F.binary_cross_entropy(x, y, reduction="none")
        elif name == "binary_cross_entropy_with_logits":
            loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        else:
            loss = distance_loss(x, y, name)
        if masks is not None:
            loss = loss[masks[i]]
        losses.append(weights[i] * (loss.mean() if reduction == "mean" else loss.sum()))
    return losses


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, shift: int) -> tuple[Any, ...]:
    """Pairs with the distances from ``shift`` on; flags for what is a cross-entropy."""
    predictions, targets, names = [], [], []
    for i, shape in enumerate(shapes):
        name = DISTANCES[(i + shift) % len(DISTANCES)]
        x, y = 2 * torch.randn(2, *shape, dtype=dtype)
        predictions.append(x.sigmoid() if name == "binary_cross_entropy" else x)
        targets.append(y > 0 if name.startswith("binary") else y)
        names.append(name)
    return predictions, targets, names, [0.5 + i for i in range(len(shapes))]


def grads_of(
    function: Any, predictions: list[Tensor], targets: list[Tensor], *args: Any, **kwargs: Any
) -> list[Tensor]:
    """Of a weighted sum of the losses, in the predictions and in those targets that are numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in predictions]
    ends = [y.detach().clone().requires_grad_() if y.is_floating_point() else y for y in targets]
    losses = function(leaves, ends, *args, **kwargs)
    sum((0.7 + i) * loss for i, loss in enumerate(losses)).backward()
    return [x.grad for x in (*leaves, *ends) if x.requires_grad]


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("sub_losses", "sub_losses_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")
    assert why_not_in_kernel([torch.zeros(2)], [torch.zeros(2)], ["l2"]) == ""


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shift", range(len(DISTANCES)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_equals_torchs_losses(
    shapes: str, dtype: torch.dtype, shift: int, reduction: str, nan_filled: None, each_isa: str
) -> None:
    arguments = make(SHAPES[shapes], dtype, shift)
    actual = sub_losses(*arguments, reduction=reduction)
    expected = by_hand(*arguments, reduction=reduction)
    assert [x.shape for x in actual] == [()] * len(expected)
    for got, want in zip(actual, expected, strict=True):
        if want.isnan():  # the mean of nothing
            assert got.isnan()
        else:
            assert_loss_near(got, want)
    assert_gradients_near(
        grads_of(sub_losses, *arguments, reduction=reduction),
        grads_of(by_hand, *arguments, reduction=reduction),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_masks(kind: str, reduction: str, nan_filled: None, each_isa: str) -> None:
    """What is masked is NaN, and counts neither for the loss nor for the gradient."""
    predictions, targets, *rest = make([(70, 1), (70, 3), (70, 400)], torch.float32, 1)
    masks = [torch.rand(70 if kind == "rows" else x.shape) < 0.5 for x in predictions]
    kwargs: dict[str, Any] = {"reduction": reduction, "masks": masks}
    expected = by_hand(predictions, targets, *rest, **kwargs)
    grads = grads_of(by_hand, predictions, targets, *rest, **kwargs)
    for x, mask in zip(predictions, masks, strict=True):
        x[~mask] = torch.nan
    for got, want in zip(sub_losses(predictions, targets, *rest, **kwargs), expected, strict=True):
        assert_loss_near(got, want)
    assert_gradients_near(grads_of(sub_losses, predictions, targets, *rest, **kwargs), grads)


def test_a_mean_of_nothing_that_counts_is_0() -> None:
    predictions, targets, *rest = make([(5, 2)], torch.float32, 0)
    masks = [torch.zeros(5) > 0]
    (loss,) = sub_losses(predictions, targets, *rest, masks=masks)
    assert loss == sub_losses_reference(predictions, targets, *rest, masks=masks)[0] == 0
    grads = grads_of(sub_losses, predictions, targets, *rest, masks=masks)
    assert all((grad == 0).all() for grad in grads)


def test_each_loss_is_differentiated_on_its_own() -> None:
    """As losses of nodes of their own: another's prediction gets no gradient, not one of zeros."""
    predictions, targets, *rest = make([(5, 2), (5, 2), (5, 2)], torch.float32, 0)
    for x in predictions[:2]:
        x.requires_grad_()
    losses = sub_losses(predictions, targets, *rest)
    assert [x.requires_grad for x in losses] == [True, True, False]
    losses[1].backward()
    assert predictions[0].grad is None
    losses[0].backward()
    actual = [x.grad for x in predictions[:2]]
    for x in predictions[:2]:
        x.grad = None
    sum(by_hand(predictions, targets, *rest)[:2]).backward()
    assert_gradients_near(actual, [x.grad for x in predictions[:2]])


@pytest.mark.parametrize("which", [0, 1])
def test_a_change_in_place_before_the_gradient_is_an_error(which: int) -> None:
    x, y = torch.randn(2, 5, requires_grad=True)
    pair = [x * 1, y * 1]
    (loss,) = sub_losses([pair[0]], [pair[1]], ["l2"], [1.0])
    with torch.no_grad():
        pair[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", DISTANCES)
def test_gradcheck_and_second_derivatives(name: str) -> None:
    """None of the values at a kink."""
    x = torch.rand(3, 4, dtype=torch.float64) * 0.8 + 0.1
    y = (torch.rand(3, 4) < 0.5).double() * 0.02 if name == "l1" else torch.rand_like(x) - 2 * x
    y = torch.rand(3, 4) < 0.5 if name.startswith("binary") else y
    mask = torch.rand(3) < 0.7
    inputs = (x.requires_grad_(), y.requires_grad_() if y.is_floating_point() else y)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return sub_losses([x], [y], [name], [1.5], masks=[mask])[0]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    predictions, targets, names, weights = make([(3, 1), (3, 4)], torch.float32, 2)
    masks = [torch.rand(3) < 0.5] * 2 if masked else []
    arguments = (predictions, targets, masks, [DISTANCES.index(n) for n in names], weights, True)
    torch.library.opcheck(torch.ops.fastwm.sub_losses, arguments)
    grads = [torch.ones(()), torch.ones(())]
    torch.library.opcheck(torch.ops.fastwm.sub_losses_backward, (grads, *arguments))


def test_strided_input_and_mixed_dtypes(nan_filled: None) -> None:
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    single = torch.randn(5, 3, 2).permute(2, 0, 1)
    arguments = ([x.T, single[0]], [y.T, single[1]], ["l2", "smooth_l1"], [1 / 3, 1.0])
    assert not any(x.is_contiguous() for x in arguments[0])
    for got, want in zip(sub_losses(*arguments), by_hand(*arguments), strict=True):
        assert got.dtype == want.dtype
        assert_loss_near(got, want)
    assert_gradients_near(grads_of(sub_losses, *arguments), grads_of(by_hand, *arguments))


def test_what_is_no_probability_is_nan_with_a_gradient_of_zero(each_isa: str) -> None:
    x = torch.tensor([0.5, 1.5, -0.1, torch.nan], requires_grad=True)
    (loss,) = sub_losses([x], [x.detach() > 0], ["binary_cross_entropy"], [1.0], reduction="sum")
    loss.backward()
    assert loss.isnan()
    assert x.grad.tolist() == [-2.0, 0.0, 0.0, 0.0]


def test_certainty_costs_100_and_large_logits_are_finite(each_isa: str) -> None:
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([True, False])
    kwargs: Any = {"reduction": "sum"}
    assert sub_losses([x], [y], ["binary_cross_entropy"], [1.0], **kwargs)[0] == 200
    x = torch.tensor([1e4, -1e4])
    assert sub_losses([x], [~y], ["binary_cross_entropy_with_logits"], [1.0], **kwargs)[0] == 2e4


def test_threads_do_not_change_the_result() -> None:
    # In float32 the last rounding would hide it.
    arguments = make([(200, 300), (70000,)], torch.float64, 1)
    run = lambda: [*sub_losses(*arguments), *grads_of(sub_losses, *arguments)]  # noqa: E731
    torch.testing.assert_close(*at_one_and_two_threads(run), rtol=0, atol=0)


def test_no_pairs_of_any_kind() -> None:
    assert sub_losses([], [], [], []) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"predictions": [torch.zeros(3).bfloat16()]}, "prediction of torch.bfloat16"),
        ({"targets": [torch.zeros(3).double()]}, "target of torch.float64"),
        (
            {"distances": ["binary_cross_entropy"], "targets": [torch.zeros(3).requires_grad_()]},
            "the target of a binary_cross_entropy requires a gradient",
        ),
    ],
)
def test_what_the_kernels_do_not_take_runs_on_the_reference(change: Any, why: str) -> None:
    arguments = {"predictions": [torch.rand(3)], "targets": [torch.rand(3)], "distances": ["l2"]}
    arguments.update(change)
    assert why in why_not_in_kernel(**arguments)
    got, want = (f(**arguments, weights=[2.0]) for f in (sub_losses, sub_losses_reference))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_torch_func() -> None:
    x, y = torch.randn(2, 4, 3)
    loss = lambda x: sub_losses([x], [y], ["l2"], [2.0])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x), 4 * (x - y) / 12)


def test_compiles_without_a_graph_break() -> None:
    x, y = torch.randn(2, 4, 3)
    x.requires_grad_()
    compiled = torch.compile(
        lambda x: sub_losses([x * 2], [y], ["l2"], [2.0])[0], fullgraph=True, backend="aot_eager"
    )
    compiled(x).backward()
    actual, x.grad = x.grad, None
    by_hand([x * 2], [y], ["l2"], [2.0])[0].backward()
    assert_gradients_near([actual], [x.grad])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": [torch.zeros(4)]}, ValueError, ["predictions[0]", "[3]", "[4]"]),
        ({"weights": [1.0, 2.0]}, ValueError, ["[1, 1, 1, 2]"]),
        ({"masks": [torch.ones(3) > 0] * 2}, ValueError, ["[1, 1, 1, 1, 2]"]),
        ({"distances": ["l3"]}, ValueError, ["'l3'", "smooth_l1"]),
        ({"reduction": "none"}, ValueError, ["'none'", "mean, sum"]),
        ({"predictions": [torch.zeros(3).int()]}, TypeError, ["predictions[0]", "int32"]),
        ({"masks": [torch.ones(3)]}, TypeError, ["masks[0]", "float32"]),
        ({"masks": [torch.ones(2) > 0]}, ValueError, ["masks[0]", "[3]", "[2]"]),
        ({"targets": [torch.zeros(3, device="meta")]}, RuntimeError, ["meta", "cpu"]),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments: dict[str, Any] = {
        "predictions": [torch.zeros(3)],
        "targets": [torch.zeros(3)],
        "distances": ["l2"],
        "weights": [1.0],
    }
    with pytest.raises(error) as caught:
        sub_losses(**{**arguments, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    x, grad = torch.zeros(6), torch.ones(())
    good: dict[str, Any] = {"p": [x], "t": [x], "m": [], "d": [1], "w": [1.0]}
    for change, match in (
        ({"t": [x[:5]]}, "target"),
        ({"t": [x.double()]}, "target"),
        ({"t": []}, "target"),
        ({"m": [torch.ones(4) > 0]}, "does not fit"),
        ({"m": [torch.zeros(0) > 0]}, "does not fit"),
        ({"m": [x]}, "mask"),
        ({"d": [5]}, "distance"),
        ({"p": [x.half()]}, "float32"),
    ):
        arguments = {**good, **change}.values()
        with pytest.raises(RuntimeError, match=match):
            torch.ops.fastwm.sub_losses(*arguments, True)
        with pytest.raises(RuntimeError, match=match):
            torch.ops.fastwm.sub_losses_backward([grad], *arguments, True)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.fastwm.sub_losses_backward([x], *good.values(), True)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shift", range(len(DISTANCES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(dtype: torch.dtype, shift: int, masked: bool, nan_filled: None) -> None:
    predictions, targets, *rest = make([*SHAPES["four"], (17, 2)], dtype, shift)
    predictions, targets = ([x.cuda() for x in xs] for xs in (predictions, targets))
    kwargs: Any = {"masks": [torch.rand(17).cuda() < 0.5] * 5} if masked else {}
    arguments = (predictions, targets, *rest)
    got, want = sub_losses(*arguments, **kwargs), sub_losses_reference(*arguments, **kwargs)
    for g, w in zip(got, want, strict=True):
        assert_loss_near(g, w)
    assert_gradients_near(
        grads_of(sub_losses, *arguments, **kwargs),
        grads_of(sub_losses_reference, *arguments, **kwargs),
    )

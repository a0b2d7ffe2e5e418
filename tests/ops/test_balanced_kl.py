"""``fastwm.balanced_kl`` against torchrl's two terms and its own reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives import categorical_kl_terms

from fastwm.ops import balanced_kl, balanced_kl_reference, cpu_library
from tests.losses import (
    assert_gradients_near,
    assert_loss_near,
    at_one_and_two_threads,
    gradients,
)

SHAPES = ((1, 1, 1), (3, 17, 5), (17, 3, 129), (129, 3, 2), (2, 5, 4, 32), (7, 9))
DTYPES = (torch.float32, torch.float64)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(2 * torch.randn(2, *shape, dtype=dtype))


def torchrls(
    posterior: Tensor,
    prior: Tensor,
    *,
    dynamics_scale: float = 1.0,
    representation_scale: float = 0.1,
    **kwargs: float,
) -> Tensor:
    """torchrl's means of one row each."""
    batch = posterior.shape[:-2]
    losses = []
    for q, p in zip(posterior.flatten(0, -3), prior.flatten(0, -3), strict=True):
        dynamics, representation = categorical_kl_terms(q, p, **kwargs)
        losses.append(dynamics_scale * dynamics + representation_scale * representation)
    return torch.stack(losses).view(batch)


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("balanced_kl", "balanced_kl_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")


@pytest.mark.parametrize("free_nats", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torchrl(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    unimix: float,
    free_nats: float,
    nan_filled: None,
    each_isa: str,
) -> None:
    logits = make(shape, dtype)
    kwargs = {"free_nats": free_nats, "unimix": unimix}
    theirs = torchrls if len(shape) > 2 else balanced_kl_reference
    assert_loss_near(balanced_kl(*logits, **kwargs), theirs(*logits, **kwargs))
    assert_gradients_near(
        gradients(lambda *x: balanced_kl(*x, **kwargs), logits),
        gradients(lambda *x: theirs(*x, **kwargs), logits),
    )


@pytest.mark.parametrize(("dynamics", "representation"), [(0.0, 1.0), (1.0, 0.0), (0.5, 0.2)])
def test_each_scale_trains_its_own_side(dynamics: float, representation: float) -> None:
    kwargs = {"dynamics_scale": dynamics, "representation_scale": representation}
    logits = make((4, 6, 8), torch.float64)
    to_posterior, to_prior = gradients(lambda *x: balanced_kl(*x, **kwargs), logits)
    assert_gradients_near(
        [to_posterior, to_prior], gradients(lambda *x: torchrls(*x, **kwargs), logits)
    )
    assert (to_posterior.abs().max() > 0) == (representation > 0)
    assert (to_prior.abs().max() > 0) == (dynamics > 0)


def test_free_nats_are_a_bound_on_the_sum_over_groups() -> None:
    """And below it nothing is trained; at it, both are."""
    near, far = torch.zeros(1, 4, 8), 5 * torch.randn(1, 4, 8)
    posterior, prior = torch.cat((near, far)), torch.zeros(2, 4, 8)
    loss = balanced_kl(posterior, prior, dynamics_scale=1.0, representation_scale=0.0)
    assert loss[0] == 1.0
    assert loss[1] > 1.0
    for grad in gradients(balanced_kl, (posterior, prior)):
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).any()


@pytest.mark.parametrize("unimix", [0.0, 0.1])
@pytest.mark.parametrize("which", ["posterior", "prior"])
def test_gradcheck_and_second_derivatives(which: str, unimix: float) -> None:
    """Of each term in the logits that it trains: for the others its gradient is stopped."""
    posterior, prior = make((3, 4, 5), torch.float64)
    scales = {
        "dynamics_scale": float(which == "prior"),
        "representation_scale": float(which == "posterior"),
    }

    def function(x: Tensor) -> Tensor:
        logits = (x, prior) if which == "posterior" else (posterior, x)
        return balanced_kl(*logits, unimix=unimix, free_nats=0.5, **scales)

    leaf = (posterior if which == "posterior" else prior).requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf,))
    assert torch.autograd.gradgradcheck(function, (leaf,))


def test_second_derivatives_are_those_of_the_stopped_reference() -> None:
    leaves = [x.clone().requires_grad_() for x in make((3, 4, 5), torch.float64)]
    results = []
    for function in (balanced_kl, torchrls):
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    assert_gradients_near(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    posterior, prior = make((3, 4, 5), dtype)
    scalars = (1.0, 0.1, 1.0, 0.01)
    grad = torch.randn(3, dtype=dtype)
    backward = torch.ops.fastwm.balanced_kl_backward
    torch.library.opcheck(backward, (grad, posterior, prior, *scalars))
    leaves = (posterior.requires_grad_(), prior.requires_grad_())
    torch.library.opcheck(torch.ops.fastwm.balanced_kl, (*leaves, *scalars))


def test_strided_input(nan_filled: None) -> None:
    logits = make((6, 4, 9))
    strided = tuple(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in logits)
    assert not strided[0].is_contiguous()
    assert torch.equal(balanced_kl(*strided), balanced_kl(*logits))
    assert torch.equal(balanced_kl(strided[0], logits[1]), balanced_kl(*logits))
    assert_gradients_near(gradients(balanced_kl, strided), gradients(torchrls, logits))


def test_expanded_gradient() -> None:
    posterior, prior = make((6, 4, 9))
    posterior.requires_grad_()
    balanced_kl(posterior, prior).sum().backward()  # a gradient of stride 0
    actual, posterior.grad = posterior.grad, None
    torchrls(posterior, prior).sum().backward()
    assert_gradients_near([actual], [posterior.grad])


def test_probabilities_that_underflow_are_finite_without_mixture() -> None:
    """torchrl takes the logarithm of a softmax, which is NaN here."""
    posterior, prior = torch.tensor([[[0.0, 300.0]]]), torch.tensor([[[250.0, 0.0]]])
    assert torchrls(posterior, prior, unimix=0.0).isnan()
    kwargs: dict[str, Any] = {"unimix": 0.0, "free_nats": 0.0, "representation_scale": 0.0}
    torch.testing.assert_close(balanced_kl(posterior, prior, **kwargs), torch.tensor([250.0]))
    for grad in gradients(lambda *x: balanced_kl(*x, unimix=0.0), (posterior, prior)):
        assert grad.isfinite().all()


def test_nan_stays_in_its_row() -> None:
    posterior, prior = make((4, 3, 20))
    posterior[1, 2, 17] = torch.nan
    assert balanced_kl(posterior, prior).isnan().tolist() == [False, True, False, False]
    for grad in gradients(balanced_kl, (posterior, prior)):
        assert grad.isnan().any(-1).any(-1).tolist() == [False, True, False, False]


def test_threads_do_not_change_the_result() -> None:
    logits = make((500, 8, 9))
    run = lambda: [balanced_kl(*logits), *gradients(balanced_kl, logits)]  # noqa: E731
    torch.testing.assert_close(*at_one_and_two_threads(run), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 2, 5)])
def test_zero_rows(shape: tuple[int, ...]) -> None:
    posterior, prior = (x.requires_grad_() for x in make(shape))
    out = balanced_kl(posterior, prior)
    assert out.shape == shape[:-2]
    out.sum().backward()
    assert posterior.grad.shape == prior.grad.shape == shape


def test_no_groups() -> None:
    logits = make((3, 0, 5))
    assert balanced_kl(*logits, representation_scale=0.0).tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype: torch.dtype) -> None:
    logits = tuple(x.to(dtype) for x in make((5, 3, 9)))
    actual = balanced_kl(*logits)
    assert actual.dtype == dtype
    assert torch.equal(actual, balanced_kl_reference(*logits))


def test_torch_func() -> None:
    posterior, prior = make((4, 3, 2, 9))
    loss = lambda x, y: balanced_kl(x, y).square().sum()  # noqa: E731
    got = torch.vmap(torch.func.grad(loss))(posterior, prior)
    for i in range(4):
        leaf = posterior[i].clone().requires_grad_()
        loss(leaf, prior[i]).backward()
        torch.testing.assert_close(got[i], leaf.grad)


def test_compiles_without_a_graph_break() -> None:
    posterior, prior = make((4, 3, 9))
    posterior.requires_grad_()
    compiled = torch.compile(
        lambda x: balanced_kl(x * 2, prior), fullgraph=True, backend="aot_eager"
    )
    out = compiled(posterior)
    out.sum().backward()
    actual, posterior.grad = posterior.grad, None
    expected = balanced_kl(posterior * 2, prior)
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(actual, posterior.grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prior_logits": torch.zeros(3, 4, 6)}, ValueError, ["[3, 4, 5]", "[3, 4, 6]"]),
        ({"prior_logits": torch.zeros(4, 5)}, ValueError, ["[3, 4, 5]", "[4, 5]"]),
        (
            {"prior_logits": torch.zeros(5), "posterior_logits": torch.zeros(5)},
            ValueError,
            ["groups", "[5]"],
        ),
        ({"unimix": 1.0}, ValueError, ["unimix", "1.0"]),
        ({"unimix": -0.1}, ValueError, ["unimix", "-0.1"]),
        (
            {"prior_logits": torch.zeros(3, 4, 5, dtype=torch.int)},
            TypeError,
            ["prior_logits", "int32"],
        ),
        (
            {"prior_logits": torch.zeros(3, 4, 5, device="meta")},
            RuntimeError,
            ["prior_logits", "meta", "cpu"],
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments = {"posterior_logits": torch.zeros(3, 4, 5), "prior_logits": torch.zeros(3, 4, 5)}
    with pytest.raises(error) as caught:
        balanced_kl(**{**arguments, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    posterior, prior = make((3, 4, 5))
    scalars = (1.0, 0.1, 1.0, 0.01)
    op, backward = torch.ops.fastwm.balanced_kl, torch.ops.fastwm.balanced_kl_backward
    for bad in (prior[:2], prior.double(), prior.transpose(0, 1)):
        with pytest.raises(RuntimeError, match="prior"):
            op(posterior, bad, *scalars)
        with pytest.raises(RuntimeError, match="prior"):
            backward(torch.ones(3), posterior, bad, *scalars)
    with pytest.raises(RuntimeError, match="grad"):
        backward(torch.ones(2), posterior, prior, *scalars)


@pytest.mark.gpu
@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, unimix: float, nan_filled: None) -> None:
    logits = tuple(x.cuda() for x in make(shape, dtype))
    ours, reference = (
        lambda *x, f=f: f(*x, unimix=unimix) for f in (balanced_kl, balanced_kl_reference)
    )
    assert_loss_near(ours(*logits), reference(*logits))
    assert_gradients_near(gradients(ours, logits), gradients(reference, logits))

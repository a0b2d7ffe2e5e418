"""``fastwm.lambda_return`` against torchrl's function, its own reference, and the float64
arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import td_lambda_return_estimate

from fastwm.ops import cpu_library, lambda_return, lambda_return_reference
from fastwm.tolerances import tolerance

SIZES = (1, 3, 17, 129)
GAMMA, LMBDA = 0.99, 0.95


def trajectory(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    done = torch.rand(shape) < 0.2
    return {
        "next_state_value": torch.randn(shape, dtype=dtype),
        "reward": torch.randn(shape, dtype=dtype),
        "done": done,
        "terminated": done & (torch.rand(shape) < 0.5),
    }


def coefficients(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    if kind == "floats":
        return GAMMA, LMBDA
    if kind == "zero-dim":
        return torch.tensor(GAMMA, dtype=dtype), torch.tensor(LMBDA, dtype=dtype)
    if kind == "gamma per step":
        return torch.rand(shape, dtype=dtype), LMBDA
    if kind == "gamma per feature":
        return torch.rand(shape[-1], dtype=dtype), LMBDA
    return torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype)


KINDS = ("floats", "zero-dim", "gamma per step", "gamma per feature", "both per step")


def gradients(function: Any, gamma: Any, lmbda: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {"gamma": gamma, "lmbda": lmbda, **data}
    leaves = {
        key: x.detach().clone().requires_grad_()
        for key, x in inputs.items()
        if isinstance(x, Tensor) and x.dtype.is_floating_point
    }
    out = function(**{**inputs, **leaves})
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("lambda_return", "lambda_return_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", SIZES)
@pytest.mark.parametrize("batch", SIZES)
def test_equals_torchrl(
    batch: int, time: int, dtype: torch.dtype, kind: str, nan_filled: None
) -> None:
    data = trajectory(batch, time, 2, dtype=dtype)
    gamma, lmbda = coefficients(kind, (batch, time, 2), dtype)
    actual = lambda_return(gamma, lmbda, **data)
    expected = td_lambda_return_estimate(gamma, lmbda, **data)
    torch.testing.assert_close(actual, expected, **tolerance("lambda_return", dtype).kwargs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (3, 17), (17, 3), (129, 129)])
def test_gradients_equal_torchrls(
    batch: int, time: int, dtype: torch.dtype, kind: str, nan_filled: None
) -> None:
    data = trajectory(batch, time, 1, dtype=dtype)
    gamma, lmbda = coefficients(kind, (batch, time, 1), dtype)
    actual = gradients(lambda_return, gamma, lmbda, data)
    expected = gradients(td_lambda_return_estimate, gamma, lmbda, data)
    assert actual.keys() == expected.keys()
    bound = tolerance("lambda_return.gradient", dtype)
    for key, grad in expected.items():
        # Sums over many steps of either sign: the bound is relative to the tensor, not to one
        # element of it.
        error = (actual[key] - grad).norm() / grad.norm().clamp_min(1e-30)
        assert error <= bound.rtol, f"{key}: relative error {error:.2e}"


def test_float32_is_near_float64() -> None:
    data = trajectory(17, 129, 1, dtype=torch.float64)
    single = {k: x.float() if x.dtype == torch.float64 else x for k, x in data.items()}
    double = {k: x.double() if x.dtype == torch.float32 else x for k, x in single.items()}
    expected = lambda_return_reference(GAMMA, LMBDA, **double)
    actual = lambda_return(GAMMA, LMBDA, **single)
    bound = tolerance("lambda_return.float64", torch.float32)
    torch.testing.assert_close(actual.double(), expected, **bound.kwargs())


def test_gradcheck_and_second_derivatives() -> None:
    data = trajectory(3, 5, 1, dtype=torch.float64)
    done, terminated = data["done"], data["terminated"]
    inputs = (
        torch.rand(3, 5, 1, dtype=torch.float64),
        torch.rand(3, 5, 1, dtype=torch.float64),
        data["next_state_value"],
        data["reward"],
    )
    inputs = tuple(x.requires_grad_() for x in inputs)

    def function(*args: Tensor) -> Tensor:
        return lambda_return(*args, done, terminated)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tensors", [False, True])
def test_opcheck(dtype: torch.dtype, tensors: bool) -> None:
    data = trajectory(3, 4, 1, dtype=dtype)
    value = data["next_state_value"].requires_grad_()
    gamma = torch.rand(3, 4, 1, dtype=dtype) if tensors else None
    flags = (data["done"], data["terminated"])
    rest = (None, GAMMA, LMBDA)
    backward = (value.detach(), *flags, gamma, *rest)
    torch.library.opcheck(torch.ops.fastwm.lambda_return_backward, backward)
    if gamma is not None:
        gamma.requires_grad_()
    forward = (value, data["reward"], *flags, gamma, *rest)
    torch.library.opcheck(torch.ops.fastwm.lambda_return, forward)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 1, dtype=x.dtype)[..., ::2]
    return {
        "time-major": x.transpose(0, -2).contiguous().transpose(0, -2),
        "sliced": padded.copy_(x),
        "reversed dims": x.permute(*reversed(range(x.ndim)))
        .contiguous()
        .permute(*reversed(range(x.ndim))),
    }


@pytest.mark.parametrize("layout", ["time-major", "sliced", "reversed dims"])
@pytest.mark.parametrize("shape", [(70, 5, 1), (33, 4, 3), (2, 3, 5, 2), (5, 3)])
def test_strided_input(layout: str, shape: tuple[int, ...], nan_filled: None) -> None:
    data = trajectory(*shape)
    strided = {key: layouts(x)[layout] for key, x in data.items()}
    expected = td_lambda_return_estimate(GAMMA, LMBDA, **data)
    exact = tolerance("lambda_return", torch.float32).kwargs()
    torch.testing.assert_close(lambda_return(GAMMA, LMBDA, **strided), expected, **exact)
    # Each operand in a layout of its own, and the gradient, too, in one that no kernel prepared
    # for.
    mixed = {**data, "reward": strided["reward"], "done": strided["done"]}
    torch.testing.assert_close(lambda_return(GAMMA, LMBDA, **mixed), expected, **exact)
    bound = tolerance("lambda_return.gradient", torch.float32).kwargs()
    for got, want in zip(
        gradients(lambda_return, GAMMA, LMBDA, strided).values(),
        gradients(td_lambda_return_estimate, GAMMA, LMBDA, data).values(),
        strict=True,
    ):
        torch.testing.assert_close(got, want, **bound)


def test_expanded_gradient() -> None:
    data = trajectory(4, 3, 1)
    value = data["next_state_value"].requires_grad_()
    lambda_return(GAMMA, LMBDA, **data).sum().backward()  # sum's gradient has strides of 0
    actual, value.grad = value.grad, None
    td_lambda_return_estimate(GAMMA, LMBDA, **data).sum().backward()
    torch.testing.assert_close(actual, value.grad)


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1, -3])
def test_time_dim(time_dim: int) -> None:
    data = trajectory(3, 4, 5)
    actual = lambda_return(GAMMA, LMBDA, **data, time_dim=time_dim)
    expected = td_lambda_return_estimate(GAMMA, LMBDA, **data, time_dim=time_dim)
    assert torch.equal(actual, expected)


def test_time_as_the_only_dimension() -> None:
    data = trajectory(7)
    column = {key: x.unsqueeze(-1) for key, x in data.items()}
    actual = lambda_return(GAMMA, LMBDA, **data, time_dim=-1)
    assert torch.equal(actual, lambda_return(GAMMA, LMBDA, **column).squeeze(-1))


def test_terminated_defaults_to_done() -> None:
    data = trajectory(5, 6, 1)
    del data["terminated"]
    expected = td_lambda_return_estimate(GAMMA, LMBDA, **data)
    assert torch.equal(lambda_return(GAMMA, LMBDA, **data), expected)


def test_non_rolling_gamma() -> None:
    data = trajectory(3, 6, 2, dtype=torch.float64)
    gamma = torch.rand(3, 6, 2, dtype=torch.float64)
    for coefficient in ((gamma, LMBDA), (GAMMA, gamma), (gamma, gamma.flip(0))):
        actual = lambda_return(*coefficient, **data, rolling_gamma=False)
        expected = td_lambda_return_estimate(*coefficient, **data, rolling_gamma=False)
        torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="rolling_gamma=False"):
        lambda_return(GAMMA, LMBDA, **data, rolling_gamma=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype: torch.dtype) -> None:
    data = trajectory(3, 4, 1, dtype=dtype)
    actual = lambda_return(GAMMA, LMBDA, **data)
    assert actual.dtype == dtype
    assert torch.equal(actual, td_lambda_return_estimate(GAMMA, LMBDA, **data))


def test_mixed_dtypes_equal_torchrl() -> None:
    data = trajectory(3, 4, 1)
    data["reward"] = data["reward"].double()
    actual = lambda_return(GAMMA, LMBDA, **data)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, td_lambda_return_estimate(GAMMA, LMBDA, **data))


def test_nan_and_infinity_spread_as_in_torchrl() -> None:
    data = trajectory(8, 9, 1)
    data["next_state_value"][0, 4] = torch.nan
    data["next_state_value"][1, 4] = torch.inf
    data["reward"][2, 8] = torch.nan
    expected = td_lambda_return_estimate(GAMMA, LMBDA, **data)
    assert expected.isnan().any()
    torch.testing.assert_close(
        lambda_return(GAMMA, LMBDA, **data), expected, equal_nan=True, rtol=0, atol=0
    )


def test_threads_do_not_change_the_result() -> None:
    data = trajectory(1000, 40, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = lambda_return(GAMMA, LMBDA, **data)
        torch.set_num_threads(4)
        four = lambda_return(GAMMA, LMBDA, **data)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


def test_inputs_are_not_written_and_outputs_not_shared() -> None:
    data = trajectory(4, 5, 1)
    before = {key: x.clone() for key, x in data.items()}
    first = lambda_return(GAMMA, LMBDA, **data)
    kept = first.clone()
    lambda_return(GAMMA, LMBDA, **{**data, "reward": data["reward"] + 1})
    assert torch.equal(first, kept)
    assert all(torch.equal(data[key], x) for key, x in before.items())


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["vmap", "vmap of grad"])
def test_torch_func(transform: Any) -> None:
    data = trajectory(4, 3, 5, 1)
    value, reward, done = data["next_state_value"], data["reward"], data["done"][0]

    def run(function: Any) -> Tensor:
        def loss(value: Tensor, reward: Tensor) -> Tensor:
            return function(GAMMA, LMBDA, value, reward, done).square().sum()

        return torch.vmap(transform(loss))(value, reward)

    torch.testing.assert_close(run(lambda_return), run(td_lambda_return_estimate))


def test_compiles_without_a_graph_break() -> None:
    data = trajectory(3, 4, 1)
    value = data.pop("next_state_value").requires_grad_()
    compiled = torch.compile(
        lambda v: lambda_return(GAMMA, LMBDA, v * 2, **data), fullgraph=True, backend="aot_eager"
    )
    out = compiled(value)
    out.sum().backward()
    actual, value.grad = value.grad, None
    expected = lambda_return_reference(GAMMA, LMBDA, value * 2, **data)
    expected.sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(actual, value.grad)


def test_empty_batch() -> None:
    for shape in ((0, 5, 1), (3, 0, 5, 1), (4, 5, 0)):
        data = trajectory(*shape)
        data["reward"].requires_grad_()
        out = lambda_return(GAMMA, LMBDA, **data)
        assert out.shape == shape
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reward": torch.zeros(3, 4)}, RuntimeError, ["reward", "[3, 4]", "[3, 4, 1]"]),
        ({"done": torch.zeros(3, 5, 1) > 0}, RuntimeError, ["done", "[3, 5, 1]", "[3, 4, 1]"]),
        ({"terminated": torch.zeros(1) > 0}, RuntimeError, ["terminated", "[1]", "[3, 4, 1]"]),
        ({"done": torch.zeros(3, 4, 1, dtype=torch.int)}, TypeError, ["done", "bool", "int32"]),
        ({"terminated": torch.zeros(3, 4, 1)}, TypeError, ["terminated", "bool", "float32"]),
        (
            {"next_state_value": torch.zeros(3, 4, 1, dtype=torch.int)},
            TypeError,
            ["next_state_value", "int32"],
        ),
        ({"reward": torch.zeros(3, 4, 1, device="meta")}, RuntimeError, ["reward", "meta", "cpu"]),
        ({"gamma": torch.rand(5)}, RuntimeError, ["[3, 4, 1]", "[5]"]),
        ({"time_dim": 3}, RuntimeError, ["[3, 4, 1]", "time_dim=3"]),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments = {"gamma": GAMMA, "lmbda": LMBDA, **trajectory(3, 4, 1), **change}
    with pytest.raises(error) as caught:
        lambda_return(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_time_and_too_few_dimensions() -> None:
    with pytest.raises(IndexError, match=r"at least one step: got shape \[3, 0, 1\]"):
        lambda_return(GAMMA, LMBDA, **trajectory(3, 0, 1))
    with pytest.raises(RuntimeError, match="time dimension are not compatible"):
        lambda_return(GAMMA, LMBDA, **trajectory(3))


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    data = trajectory(3, 4, 1)
    value, reward, done, _ = data.values()
    for bad in (reward[:2], reward.double(), reward[..., 0]):
        with pytest.raises(RuntimeError, match="reward"):
            torch.ops.fastwm.lambda_return(value, bad, done, done, None, None, GAMMA, LMBDA)
        with pytest.raises(RuntimeError, match="gamma"):
            torch.ops.fastwm.lambda_return(value, reward, done, done, bad, None, GAMMA, LMBDA)
    with pytest.raises(RuntimeError, match="done"):
        torch.ops.fastwm.lambda_return_backward(value, reward, done, None, None, GAMMA, LMBDA)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 1), (129, 3, 2), (2, 3, 5, 2), (40, 7)])
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, kind: str, nan_filled: None) -> None:
    data = {key: x.cuda() for key, x in trajectory(*shape, dtype=dtype).items()}
    gamma, lmbda = (
        x.cuda() if isinstance(x, Tensor) else x for x in coefficients(kind, shape, dtype)
    )
    bound = tolerance("lambda_return.triton", dtype).kwargs()
    actual = lambda_return(gamma, lmbda, **data)
    torch.testing.assert_close(actual, lambda_return_reference(gamma, lmbda, **data), **bound)
    value = data["next_state_value"].requires_grad_()
    lambda_return(gamma, lmbda, **data).sum().backward()
    grad, value.grad = value.grad, None
    lambda_return_reference(gamma, lmbda, **data).sum().backward()
    torch.testing.assert_close(
        grad, value.grad, **tolerance("lambda_return.gradient", dtype).kwargs()
    )

"""``fastwm.gae`` against torchrl's function, its own reference, and the float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate

from fastwm.ops import cpu_library, gae, gae_reference
from fastwm.tolerances import tolerance

SIZES = (1, 3, 17, 129)
GAMMA, LMBDA = 0.997, 0.9  # whose float32 product is not the product of their float32s
DTYPES = (torch.float32, torch.float64)


@pytest.fixture
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torchrl rounds a gamma that is a float to the default dtype, whatever the values have."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(was)


def trajectory(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    done = torch.rand(shape) < 0.2
    return {
        "state_value": torch.randn(shape, dtype=dtype),
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
    if kind == "lambda per step":
        return GAMMA, torch.rand(shape, dtype=dtype)
    if kind == "gamma per feature":
        return torch.rand(shape[-1], dtype=dtype), LMBDA
    return torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype)


KINDS = (
    "floats", "zero-dim", "gamma per step", "lambda per step", "gamma per feature", "both per step",
)  # fmt: skip


def gradients(function: Any, gamma: Any, lmbda: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {"gamma": gamma, "lmbda": lmbda, **data}
    leaves = {
        key: x.detach().clone().requires_grad_()
        for key, x in inputs.items()
        if isinstance(x, Tensor) and x.dtype.is_floating_point
    }
    advantage, target = function(**{**inputs, **leaves})
    weight = torch.linspace(-1, 2, target.numel(), dtype=target.dtype).view(target.shape)
    (advantage * weight + target * weight.square()).sum().backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: Any) -> None:
    """Sums over many steps of either sign: the bound is relative to the tensor, not to one element
    of it."""
    assert actual.keys() == expected.keys()
    for key, grad in expected.items():
        error = (actual[key] - grad).norm() / grad.norm().clamp_min(1e-30)
        assert error <= bound.rtol, f"{key}: relative error {error:.2e}"


def test_the_cpp_kernel_is_what_these_tests_run() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    for op in ("gae", "gae_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwm::{op}", "CPU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", SIZES)
@pytest.mark.parametrize("batch", SIZES)
def test_equals_torchrl(
    batch: int, time: int, dtype: torch.dtype, kind: str, nan_filled: None, default_dtype: None
) -> None:
    data = trajectory(batch, time, 2, dtype=dtype)
    gamma, lmbda = coefficients(kind, (batch, time, 2), dtype)
    actual = gae(gamma, lmbda, **data)
    expected = generalized_advantage_estimate(gamma, lmbda, **data)
    torch.testing.assert_close(actual, expected, **tolerance("gae", dtype).kwargs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (3, 17), (17, 3), (129, 129)])
def test_gradients_equal_torchrls(
    batch: int, time: int, dtype: torch.dtype, kind: str, nan_filled: None, default_dtype: None
) -> None:
    data = trajectory(batch, time, 1, dtype=dtype)
    gamma, lmbda = coefficients(kind, (batch, time, 1), dtype)
    actual = gradients(gae, gamma, lmbda, data)
    expected = gradients(generalized_advantage_estimate, gamma, lmbda, data)
    assert_near(actual, expected, tolerance("gae.gradient", dtype))


def test_float64_values_are_discounted_by_the_gamma_that_was_given() -> None:
    """torchrl rounds 0.99 to float32 here."""
    data = trajectory(3, 17, 1, dtype=torch.float64)
    exact = (torch.full((3, 17, 1), x, dtype=torch.float64) for x in (GAMMA, LMBDA))
    expected = generalized_advantage_estimate(*exact, **data)
    bound = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(gae(GAMMA, LMBDA, **data), expected, **bound)
    rounded, _ = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    assert (rounded - expected[0]).abs().max() > 1e-10


def test_float32_is_near_float64() -> None:
    data = trajectory(17, 129, 1, dtype=torch.float64)
    single = {k: x.float() if x.dtype == torch.float64 else x for k, x in data.items()}
    double = {k: x.double() if x.dtype == torch.float32 else x for k, x in single.items()}
    expected = gae_reference(GAMMA, LMBDA, **double)
    actual = [x.double() for x in gae(GAMMA, LMBDA, **single)]
    bound = tolerance("gae.float64", torch.float32)
    torch.testing.assert_close(actual, list(expected), **bound.kwargs())


def test_gradcheck_and_second_derivatives() -> None:
    data = trajectory(3, 5, 1, dtype=torch.float64)
    done, terminated = data.pop("done"), data.pop("terminated")
    assert done.any()
    coefficient = torch.rand(2, 3, 5, 1, dtype=torch.float64).unbind()
    inputs = tuple(x.clone().requires_grad_() for x in (*coefficient, *data.values()))

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return gae(*args, done, terminated)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", [False, True])
def test_opcheck(dtype: torch.dtype, tensors: bool) -> None:
    data = trajectory(3, 4, 1, dtype=dtype)
    value, next_value, reward, *flags = data.values()
    gamma = torch.rand(3, 4, 1, dtype=dtype) if tensors else None
    rest = (None, GAMMA, LMBDA)
    torch.library.opcheck(torch.ops.fastwm.gae_backward, (value, reward, *flags, gamma, *rest))
    if gamma is not None:
        gamma.requires_grad_()
    forward = (value.clone().requires_grad_(), next_value, reward, *flags, gamma, *rest)
    torch.library.opcheck(torch.ops.fastwm.gae, forward)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 1, dtype=x.dtype)[..., ::2]
    return {
        "time-major": x.transpose(0, -2).contiguous().transpose(0, -2),
        "sliced": padded.copy_(x),
    }


@pytest.mark.parametrize("layout", ["time-major", "sliced"])
@pytest.mark.parametrize("shape", [(70, 5, 1), (33, 4, 3), (2, 3, 5, 2), (5, 3)])
def test_strided_input(layout: str, shape: tuple[int, ...], nan_filled: None) -> None:
    data = trajectory(*shape)
    strided = {key: layouts(x)[layout] for key, x in data.items()}
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    exact = tolerance("gae", torch.float32).kwargs()
    torch.testing.assert_close(gae(GAMMA, LMBDA, **strided), expected, **exact)
    mixed = {**data, "reward": strided["reward"], "done": strided["done"]}
    torch.testing.assert_close(gae(GAMMA, LMBDA, **mixed), expected, **exact)
    assert_near(
        gradients(gae, GAMMA, LMBDA, strided),
        gradients(generalized_advantage_estimate, GAMMA, LMBDA, data),
        tolerance("gae.gradient", torch.float32),
    )


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int) -> None:
    data = trajectory(4, 3, 1)
    value = data["state_value"].requires_grad_()
    gae(GAMMA, LMBDA, **data)[output].sum().backward()  # sum's gradient has strides of 0
    actual, value.grad = value.grad, None
    generalized_advantage_estimate(GAMMA, LMBDA, **data)[output].sum().backward()
    torch.testing.assert_close(actual, value.grad)


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1, -3])
def test_time_dim(time_dim: int) -> None:
    data = trajectory(3, 4, 5)
    actual = gae(GAMMA, LMBDA, **data, time_dim=time_dim)
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data, time_dim=time_dim)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_time_as_the_only_dimension() -> None:
    data = trajectory(7)
    actual = gae(GAMMA, LMBDA, **data, time_dim=-1)
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data, time_dim=-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_terminated_defaults_to_done() -> None:
    data = trajectory(5, 6, 1)
    del data["terminated"]
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    torch.testing.assert_close(gae(GAMMA, LMBDA, **data), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype: torch.dtype) -> None:
    data = trajectory(3, 4, 1, dtype=dtype)
    actual = gae(GAMMA, LMBDA, **data)
    assert actual[0].dtype == actual[1].dtype == dtype
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["state_value", "reward"])
def test_mixed_dtypes_equal_torchrl(key: str) -> None:
    data = trajectory(3, 4, 1)
    data[key] = data[key].double()
    actual = gae(GAMMA, LMBDA, **data)
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    torch.testing.assert_close(actual, expected)


def test_nan_and_infinity_spread_as_in_torchrl() -> None:
    data = trajectory(8, 9, 1)
    data["next_state_value"][0, 4] = torch.nan
    data["next_state_value"][1, 4] = torch.inf
    data["reward"][2, 8] = torch.nan
    data["state_value"][3, 3] = torch.nan
    expected = generalized_advantage_estimate(GAMMA, LMBDA, **data)
    assert expected[0].isnan().any()
    torch.testing.assert_close(
        gae(GAMMA, LMBDA, **data), expected, equal_nan=True, rtol=0, atol=0
    )  # fmt: skip


def test_threads_do_not_change_the_result() -> None:
    data = trajectory(1000, 40, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((gae(GAMMA, LMBDA, **data), gradients(gae, GAMMA, LMBDA, data)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inputs_are_not_written_and_outputs_not_shared() -> None:
    data = trajectory(4, 5, 1)
    before = {key: x.clone() for key, x in data.items()}
    first = gae(GAMMA, LMBDA, **data)
    kept = [x.clone() for x in first]
    gae(GAMMA, LMBDA, **{**data, "reward": data["reward"] + 1})
    assert all(map(torch.equal, first, kept))
    assert all(torch.equal(data[key], x) for key, x in before.items())


def test_torch_func() -> None:
    data = trajectory(4, 3, 5, 1)
    value, next_value, reward = (data[k] for k in ("state_value", "next_state_value", "reward"))
    done = data["done"][0]

    def loss(value: Tensor, next_value: Tensor, reward: Tensor) -> Tensor:
        return gae(GAMMA, LMBDA, value, next_value, reward, done)[0].square().sum()

    got = torch.vmap(torch.func.grad(loss))(value, next_value, reward)
    for i in range(4):
        leaf = value[i].clone().requires_grad_()
        loss(leaf, next_value[i], reward[i]).backward()
        torch.testing.assert_close(got[i], leaf.grad)


def test_compiles_without_a_graph_break() -> None:
    data = trajectory(3, 4, 1)
    value = data.pop("state_value").requires_grad_()
    compiled = torch.compile(
        lambda v: gae(GAMMA, LMBDA, v * 2, **data), fullgraph=True, backend="aot_eager"
    )
    out, _ = compiled(value)
    out.sum().backward()
    actual, value.grad = value.grad, None
    expected, _ = gae_reference(GAMMA, LMBDA, value * 2, **data)
    expected.sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(actual, value.grad)


@pytest.mark.parametrize("shape", [(0, 5, 1), (3, 0, 5, 1), (4, 5, 0), (4, 0, 1)])
def test_empty(shape: tuple[int, ...]) -> None:
    data = trajectory(*shape)
    data["reward"].requires_grad_()
    advantage, target = gae(GAMMA, LMBDA, **data)
    assert advantage.shape == target.shape == shape
    (advantage + target).sum().backward()
    assert data["reward"].grad.shape == shape


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reward": torch.zeros(3, 4)}, RuntimeError, ["reward", "[3, 4]", "[3, 4, 1]"]),
        ({"state_value": torch.zeros(4, 1)}, RuntimeError, ["state_value", "[4, 1]", "[3, 4, 1]"]),
        ({"done": torch.zeros(3, 5, 1) > 0}, RuntimeError, ["done", "[3, 5, 1]", "[3, 4, 1]"]),
        ({"terminated": torch.zeros(1) > 0}, RuntimeError, ["terminated", "[1]", "[3, 4, 1]"]),
        ({"done": torch.zeros(3, 4, 1, dtype=torch.int)}, TypeError, ["done", "bool", "int32"]),
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
        gae(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_op_itself_refuses_what_would_read_out_of_bounds() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"the reference has no pointers: {cpu_library().reason}")
    value, next_value, reward, done, _ = trajectory(3, 4, 1).values()
    rest = (None, None, GAMMA, LMBDA)
    for bad in (reward[:2], reward.double(), reward[..., 0]):
        with pytest.raises(RuntimeError, match="reward"):
            torch.ops.fastwm.gae(value, next_value, bad, done, done, *rest)
        with pytest.raises(RuntimeError, match="next_value"):
            torch.ops.fastwm.gae(value, bad, reward, done, done, *rest)
        with pytest.raises(RuntimeError, match="gamma"):
            torch.ops.fastwm.gae(value, next_value, reward, done, done, bad, *rest[1:])
        with pytest.raises(RuntimeError, match="grad_target"):
            torch.ops.fastwm.gae_backward(value, bad, done, done, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 1), (129, 3, 2), (2, 3, 5, 2), (40, 7)])
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, kind: str, nan_filled: None) -> None:
    data = {key: x.cuda() for key, x in trajectory(*shape, dtype=dtype).items()}
    gamma, lmbda = (
        x.cuda() if isinstance(x, Tensor) else x for x in coefficients(kind, shape, dtype)
    )
    bound = tolerance("gae.triton", dtype).kwargs()
    torch.testing.assert_close(
        gae(gamma, lmbda, **data), gae_reference(gamma, lmbda, **data), **bound
    )
    assert_near(
        gradients(gae, gamma, lmbda, data),
        gradients(gae_reference, gamma, lmbda, data),
        tolerance("gae.gradient", dtype),
    )

"""From a step graph to the Python source of the whole horizon's loop.

Straight-line code on local variables, each op bound to the quickest callable that reaches it. What does
not depend on the step (transposes of weights, constants) stands before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastwm.engines.defer import split
from fastwm.step_graph import Meta, Op, StepGraph, Value

__all__ = ["LoopSource", "binding", "loop_source", "step_varying"]

aten = torch.ops.aten
# Returns its input as it is; without gradients so does detach.
_IDENTITY = {aten.lift_fresh.default, aten.alias.default}
_IDENTITY_NO_GRAD = _IDENTITY | {aten.detach.default}
# Elementwise ops with an in-place twin that computes the very same numbers.
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.silu.default: torch._C._nn.silu_,
    aten.relu.default: torch.relu_,
    aten.tanh.default: torch.tanh_,
    aten.sigmoid.default: torch.sigmoid_,
    aten.elu.default: torch._C._nn.elu_,
    aten.leaky_relu.default: torch._C._nn.leaky_relu_,
    aten.gelu.default: torch._C._nn.gelu_,  # type: ignore[attr-defined]
    aten.exp.default: torch.exp_,
}


# Ops that can write into memory they are handed: no allocation per step, and always the same warm lines.
_INTO = {aten.addmm.default, aten.mm.default, aten.bmm.default, aten.cat.default}


def binding(target: Callable[..., Any]) -> Callable[..., Any]:
    """A callable for an ATen overload: torch's own Python binding where there is one.

    An ``OpOverload`` converts its arguments through boxed values, about 1-2 us a call more than the
    binding that ``torch.addmm`` and the like are.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return target  # a custom autograd.Function
    name = target._schema.name.removeprefix("aten::")
    for namespace in (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase):
        found = getattr(namespace, name, None)
        if found is not None:
            return found
    return target


def step_varying(graph: StepGraph, changing: set[Any], *, grad: bool = False) -> set[int]:
    """Values that can differ from step to step, given the input names that do.

    A value is fixed over the horizon when it is computed from fixed ones alone, draws nothing, and lives
    in memory that no op writes in place. With ``grad``, what autocast casts down counts as varying: done once
    for all steps, its gradients would add up in the lower precision.
    """
    varying = {v.index for key, v in graph.inputs.items() if key in changing}
    written = {graph.storage[m.index] for op in graph.ops for m in op.mutates}
    for op in graph.ops:
        moves = op.draws or any(v.index in varying for v in op.inputs())
        moves = moves or any(
            graph.storage.get(v.index) in written
            for v in (*op.inputs(), *op.outputs)
            if v is not None
        )
        moves = moves or (grad and _casts_down(op, graph))
        if moves:
            varying.update(o.index for o in op.outputs if o is not None)
    return varying


def _casts_down(op: Op, graph: StepGraph) -> bool:
    made = [graph.metas[o.index].dtype for o in op.outputs if o is not None]
    read = [graph.metas[v.index].dtype for v in op.inputs()]
    half = (torch.bfloat16, torch.float16)
    return any(d in half for d in made) and any(d not in half for d in read)


# (ops, argument values, result values, value -> canonical value) -> the function of those
Compiler = Callable[[list[Op], list[int], list[int], Callable[[Value], int]], Callable[..., Any]]


@dataclass
class LoopSource:
    """Source of ``run(horizon, inputs, constants, feed, sinks)`` and what it binds.

    Where part of the step was put off, also of ``after(inputs, constants, rows)``. ``run`` returns
    ``(steps run, fixed values, checks)``. ``inputs`` and ``constants`` are in the graph's order;
    ``feed()`` gives this step's fed inputs; ``sinks`` collect the values of :attr:`collected`.
    """

    text: str
    scope: dict[str, Any]
    collected: list[int]
    fixed: list[int]
    canonical: Callable[[Value], int]
    rows: list[int]  # values of every step that ``after`` takes, as [batch * time, features]
    after: list[int]  # values that it returns
    put_off: list[int]  # values that it computes

    def compile(self) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """``run``, and ``after`` or None."""
        scope = dict(self.scope)
        exec(compile(self.text, "<fastwm loop>", "exec"), scope)
        return scope["run"], scope.get("after")


def loop_source(
    graph: StepGraph,
    carried: dict[Any, Any],
    fed: list[Any],
    outputs: list[Any],
    stop_on: list[Any],
    *,
    grad: bool,
    write: bool,
    exact: bool = False,
    defer: bool = False,
    once: bool = False,
    compiler: Compiler | None = None,
) -> LoopSource:
    """Write the loop.

    Args:
        graph: the step.
        carried: input name -> output name that feeds it at the next step.
        fed: input names given anew at each step from outside.
        outputs: output names that the caller wants for every step.
        stop_on: output names of flags; the loop ends after a step where any is true.
        grad: keep autograd semantics (no in-place shortcuts, ``detach`` stays).
        write: sinks are ``[horizon]`` lists of destination views to copy into, else list appenders.
        exact: bind every op to its overload itself, the slow and certain way.
        defer: put off what feeds no later step; see :mod:`fastwm.engines.defer`.
        once: there is one step: nothing is done ahead of it, to be kept for more.
        compiler: turns the body into one function, e.g. through Inductor.
    """
    ops, alias = _without_identities(graph, grad)

    def root(value: Value) -> int:
        index = value.index
        while index in alias:
            index = alias[index]
        return index

    changing = set(carried) | set(fed)
    varying = set(graph.metas) if once else step_varying(graph, changing, grad=grad)
    scope: dict[str, Any] = {}
    bound: dict[Any, str] = {}

    def bind(obj: Any, prefix: str) -> str:
        # Bound methods are made anew at each access, and equal.
        key = obj if callable(obj) else id(obj)
        if key not in bound:
            bound[key] = f"{prefix}{len(bound)}"
            scope[bound[key]] = obj
        return bound[key]

    def literal(item: Any) -> str:
        if isinstance(item, Value):
            return f"v{root(item)}"
        if isinstance(item, list):
            return "[" + ", ".join(map(literal, item)) + "]"
        if isinstance(item, tuple) and not isinstance(item, torch.Size):
            return "(" + "".join(literal(i) + ", " for i in item) + ")"
        if item is None or isinstance(item, (bool, int, str)):
            return repr(item)
        if isinstance(item, float) and item == item and abs(item) != float("inf"):
            return repr(item)
        return bind(item, "c")

    in_place = set() if grad else _in_place_ops(graph, ops, root, varying)

    into: dict[int, int] = {}  # op -> the buffer its result goes to

    def line(op: Op) -> str:
        if id(op) in in_place:
            fn = _IN_PLACE[op.target]
        else:
            fn = op.target if exact else binding(op.target)
        args = [literal(a) for a in op.args]
        args += [f"{k}={literal(a)}" for k, a in op.kwargs.items() if not _default(op, k, a)]
        if id(op) in into:
            args.append(f"out=w{into[id(op)]}")
        call = f"{bind(fn, 'f')}({', '.join(args)})"
        if op.detached:
            call = f"detach({call})" if op.single else f"[detach(t) for t in {call}]"
        if op.single:
            target = f"v{op.outputs[0].index} = " if op.outputs[0] is not None else ""
        else:
            names = ["_" if o is None else f"v{o.index}" for o in op.outputs]
            target = ", ".join(names) + ("," if len(names) == 1 else "") + " = "
        return target + call

    scope["detach"] = torch.detach
    scope["empty"] = torch.empty
    before = [op for op in ops if all(o is None or o.index not in varying for o in op.outputs)]
    before = [op for op in before if not op.mutates and not op.draws]
    body = [op for op in ops if not any(op is b for b in before)]

    later: list[Op] = []
    if defer:
        # A carried entry that the step itself never reads (a flag of the last step) may wait, too.
        reads = {root(v) for op in body for v in op.inputs()}
        state = [graph.outputs[o] for k, o in carried.items() if graph.inputs[k].index in reads]
        flagged = [graph.outputs[k] for k in stop_on]
        needed = [root(v) for v in (*state, *flagged, *graph.checks)]
        body, later = split(body, graph, root, varying, needed)
    put_off = {o.index for op in later for o in op.outputs if o is not None}
    rows = list(dict.fromkeys(
        root(v) for op in later for v in op.inputs() if v.index in varying and root(v) not in put_off
    ))  # fmt: skip
    from_carried = {graph.inputs[k].index for k in carried}
    collected = list(dict.fromkeys(
        [root(graph.outputs[k]) for k in outputs if graph.outputs[k].index in varying]
        + [i for i in rows if i not in from_carried]
    ))  # fmt: skip
    after = [i for i in collected if i in put_off]
    collected = [i for i in collected if i not in put_off]
    fixed = list(dict.fromkeys(
        root(graph.outputs[k]) for k in outputs if graph.outputs[k].index not in varying
    ))  # fmt: skip

    unpack = []
    if graph.inputs:
        unpack.append(f"    {''.join(f'v{v.index}, ' for v in graph.inputs.values())} = inputs")
    if graph.constants:
        unpack.append(f"    {''.join(f'v{v.index}, ' for v, _ in graph.constants)} = constants")
    needs = {root(v) for op in body for v in op.inputs()} | set(fixed)
    needs |= {root(c) for c in graph.checks}
    needs |= {root(graph.outputs[k]) for k in (*stop_on, *carried.values())} - put_off
    text = ["def run(horizon, inputs, constants, feed, sinks):", *unpack, "    checks = []"]
    text += [f"    {line(op)}" for op in _only_for(before, needs, root)]
    last: dict[int, list[int]] = {}
    if not grad and compiler is None:
        # Freed at once, a temporary's memory is still in cache when the next op asks for some.
        last = _last_uses(body, graph, root, varying, collected, carried, stop_on)
        if not exact:
            found, buffers = _buffers(body, graph, root, in_place, last)
            into.update(found)
            for number, (shape, dtype, device) in enumerate(buffers):
                kind = f"dtype={bind(dtype, 'c')}, device={bind(device, 'c')}"
                text.append(f"    w{number} = empty({list(shape)}, {kind})")
    if collected:
        text.append(f"    {''.join(f's{i}, ' for i in collected)} = sinks")
    text.append("    for step in range(horizon):")
    top = len(text)
    indent = "        "
    if fed:
        names = "".join(f"v{graph.inputs[k].index}, " for k in fed)
        text.append(f"{indent}{names} = feed()")
    if compiler is not None:
        wanted = collected + [root(graph.outputs[o]) for o in (*carried.values(), *stop_on)]
        wanted = [i for i in wanted + [root(c) for c in graph.checks] if i in varying]
        made = {o.index for op in body for o in op.outputs if o is not None}
        results = [i for i in dict.fromkeys(wanted) if i in made]
        arguments = list(dict.fromkeys(
            root(v) for op in body for v in op.inputs() if root(v) not in made
        ))  # fmt: skip
        scope["inner"] = compiler(body, arguments, results, root)
        text.append(
            f"{indent}{''.join(f'v{i}, ' for i in results)} = inner({', '.join(f'v{i}' for i in arguments)})"
        )
    else:
        for position, op in enumerate(body):
            text.append(indent + line(op))
            dead = last.get(position)
            if dead:
                text.append(f"{indent}del {', '.join(f'v{i}' for i in dead)}")
    for index in collected:
        sink = f"s{index}[step].copy_(v{index})" if write else f"s{index}(v{index})"
        text.append(indent + sink)
    text += [f"{indent}checks.append(v{root(c)})" for c in graph.checks]
    flags = [root(graph.outputs[k]) for k in stop_on if graph.outputs[k].index in varying]
    constant_flags = [
        root(graph.outputs[k]) for k in stop_on if graph.outputs[k].index not in varying
    ]
    moves = [(graph.inputs[k].index, root(graph.outputs[o])) for k, o in carried.items()]
    read = {root(v) for op in body for v in op.inputs()} | set(collected)
    moves = [(a, b) for a, b in moves if a != b and a in read]
    flags = list(dict.fromkeys(flags))
    if flags:
        text.append(f"{indent}if {' or '.join(f'v{i}.any()' for i in flags)}: break")
    if constant_flags:
        condition = " or ".join(f"v{i}.any()" for i in dict.fromkeys(constant_flags))
        text.append(f"{indent}if step == 0 and ({condition}): break")
    if moves:
        left, right = zip(*moves, strict=True)
        text.append(
            f"{indent}{', '.join(f'v{i}' for i in left)} = {', '.join(f'v{i}' for i in right)}"
        )
    if len(text) == top:
        text.append(f"{indent}pass")
    text.append(f"    return step + 1, ({''.join(f'v{i}, ' for i in fixed)}), checks")
    if later:
        needs = {root(v) for op in later for v in op.inputs()}
        text += ["", "def after(inputs, constants, rows):", *unpack]
        text += [f"    {line(op)}" for op in _only_for(before, needs, root)]
        text.append(f"    {''.join(f'v{i}, ' for i in rows)} = rows")
        text += [f"    {line(op)}" for op in later]
        text.append(f"    return ({''.join(f'v{i}, ' for i in after)})")
    return LoopSource(
        "\n".join(text) + "\n", scope, collected, fixed, root, rows, after, sorted(put_off)
    )


def _only_for(before: list[Op], needs: set[int], root: Callable[[Value], int]) -> list[Op]:
    """Of the ops ahead of the loop, those that lead to a needed value."""
    wanted, kept = set(needs), []
    for op in reversed(before):
        if any(o is not None and root(o) in wanted for o in op.outputs):
            kept.append(op)
            wanted.update(root(v) for v in op.inputs())
    return kept[::-1]


def _without_identities(graph: StepGraph, grad: bool) -> tuple[list[Op], dict[int, int]]:
    identities = _IDENTITY if grad else _IDENTITY_NO_GRAD
    if any(op.mutates for op in graph.ops):
        identities = set()  # an alias may be there to be written through
    alias: dict[int, int] = {}
    ops = []
    for op in graph.ops:
        out = op.outputs[0]
        if op.target in identities and op.single and out is not None:
            if out.index != op.args[0].index:  # lift_fresh hands back its very input
                alias[out.index] = op.args[0].index
        else:
            ops.append(op)
    return ops, alias


def _default(op: Op, name: str, given: Any) -> bool:
    """A keyword that says what the schema says anyway need not be parsed again each step."""
    schema = getattr(op.target, "_schema", None)
    for argument in schema.arguments if schema is not None else ():
        if argument.name == name:
            return given is None and argument.default_value is None and argument.has_default_value()
    return False


def _in_place_ops(
    graph: StepGraph, ops: list[Op], root: Callable[[Value], int], varying: set[int]
) -> set[int]:
    """Ops that may overwrite their input: a fresh temporary, its memory nobody else's, read last here."""
    owners: dict[int, set[int]] = {}
    for index, memory in graph.storage.items():
        owners.setdefault(memory, set()).add(index)
    held = {root(v) for v in graph.inputs.values()} | {v.index for v, _ in graph.constants}
    held |= {root(v) for v in (*graph.outputs.values(), *graph.checks)}
    uses: dict[int, int] = {}
    for op in ops:
        for value in set(op.inputs()):
            uses[root(value)] = uses.get(root(value), 0) + 1
    chosen = set()
    for op in ops:
        if op.target not in _IN_PLACE or op.kwargs.keys() - {"approximate"}:
            continue
        source = op.args[0]
        if root(source) in held or uses.get(root(source)) != 1 or source.index != root(source):
            continue
        if owners[graph.storage[source.index]] - {source.index}:
            continue
        out = op.outputs[0]
        if out is None or graph.metas[out.index].dtype != graph.metas[source.index].dtype:
            continue  # exp of integers is floating point
        if out.index in varying and source.index not in varying:
            continue  # made once for all steps: the next one reads it again
        chosen.add(id(op))
    return chosen


def _last_uses(
    body: list[Op], graph: StepGraph, root: Callable[[Value], int], varying: set[int],
    collected: list[int], carried: dict[Any, Any], stop_on: list[Any],
) -> dict[int, list[int]]:  # fmt: skip
    """Body position -> temporaries nobody reads after it, so that their memory is free again."""
    keep = set(collected) | {v.index for v in graph.inputs.values()}
    keep |= {root(graph.outputs[o]) for o in carried.values()}
    keep |= {root(graph.outputs[o]) for o in stop_on} | {root(c) for c in graph.checks}
    last: dict[int, int] = {}
    for position, op in enumerate(body):
        for value in (*op.inputs(), *(o for o in op.outputs if o is not None)):
            if value.index in varying and root(value) not in keep:
                last[root(value)] = position
    made = {o.index for op in body for o in op.outputs if o is not None}
    at: dict[int, list[int]] = {}
    for index, position in last.items():
        if index in made:
            at.setdefault(position, []).append(index)
    return at


def _buffers(
    body: list[Op], graph: StepGraph, root: Callable[[Value], int], in_place: set[int],
    last: dict[int, list[int]],
) -> tuple[dict[int, int], list[Meta]]:  # fmt: skip
    """Which op writes its result into which reused buffer, and the buffers.

    Only results that no later step and no caller sees. A buffer is free again once nothing that lives in
    its memory (the result, views of it, what overwrote it in place) is read any more.
    """
    home: dict[int, int] = {}  # memory of the trace -> memory it lives in now

    def memory(index: int) -> int:
        at = graph.storage[index]
        while at in home:
            at = home[at]
        return at

    for op in body:
        if id(op) in in_place and op.outputs[0] is not None:
            home[graph.storage[op.outputs[0].index]] = memory(root(op.args[0]))
    dies = {index: position for position, dead in last.items() for index in dead}
    inside: dict[int, list[int]] = {}
    for op in body:
        for out in op.outputs:
            if out is not None:
                inside.setdefault(memory(out.index), []).append(out.index)
    into: dict[int, int] = {}
    buffers: list[Meta] = []
    free: list[int] = []
    release: dict[int, list[int]] = {}
    for position, op in enumerate(body):
        out = op.outputs[0] if op.single else None
        if op.target in _INTO and not op.kwargs and out is not None:
            values = inside[memory(out.index)]
            if all(v in dies for v in values):
                meta = graph.metas[out.index]
                number = next((n for n in free if buffers[n] == meta), len(buffers))
                if number == len(buffers):
                    buffers.append(meta)
                else:
                    free.remove(number)
                into[id(op)] = number
                release.setdefault(max(dies[v] for v in values), []).append(number)
        free += release.pop(position, [])
    return into, buffers

"""Which of two engines that can run a rollout is the quicker one: the rule behind ``backend="auto"``.

It rests on recorded rows, ``bench/results/wide_layers.jsonl`` (measured anew by ``bench/wide_layers.py``):

- without gradients the fused engine is ahead at every width up to 2048 and every batch;
- with gradients it is ahead too, but for matrices of many millions of elements with few rows. There each step
  of one row costs reading all of them, and the sums for their gradients are as large once more; what the
  captured engine's vendor products do no worse.
"""

from __future__ import annotations

__all__ = ["prefers_captured"]

#: The rule for CUDA, until there are rows that were measured there.
UNMEASURED = (
    "not measured on a GPU yet, and so left to the captured engine: backend='fused' asks for it"
)
#: And for steps of bfloat16, on any device.
OTHER_ROUNDINGS = (
    "bfloat16 values are held in float32 within the rollout, where eager rounds each of them: "
    "backend='fused' asks for it"
)
# Elements of all matrices of a step, and rows of a batch.
MANY_ELEMENTS = 1 << 23
FEW_ROWS = 8


def prefers_captured(elements: int, rows: int, device: str = "cpu", *, gradients: bool) -> str:
    """Why the captured engine is chosen although the fused one could run; "" where it is not.

    Args:
        elements: of all matrices that the step multiplies with.
        rows: of the batch.
        device: its type.
        gradients: whether gradients are wanted.

    Example:
        >>> from fastwm.engines.choice import prefers_captured
        >>> prefers_captured(265_000, 1, gradients=True)
        ''
        >>> prefers_captured(13_000_000, 1, gradients=True)
        'slower than captured for gradients of 13 million weights with 1 row (see fastwm/engines/choice.py)'
    """
    if device != "cpu":
        return UNMEASURED
    if gradients and elements >= MANY_ELEMENTS and rows < FEW_ROWS:
        plural = "" if rows == 1 else "s"
        return (
            f"slower than captured for gradients of {elements // 1_000_000} million weights with {rows} "
            f"row{plural} (see fastwm/engines/choice.py)"
        )
    return ""

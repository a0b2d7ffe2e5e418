"""From a traced step to a row program, by what its ATen ops compute.

Example:
    >>> import torch
    >>> from fastwm.row_program.lowering import lower
    >>> from fastwm.tracing import trace
    >>> weight = torch.ones(4, 4)
    >>> graph, _, _ = trace(
    ...     lambda td: {("td", ("z",)): td["z",], ("state", ("z",)): torch.tanh(td["z",] @ weight.T)},
    ...     {("z",): torch.zeros(3, 4)}, lambda tensor: tensor is weight)
    >>> print(lower(graph, carried=[("z",)], fed=[], dim=1).program)
    row program (float32)
      carry   %0 in.z: f[4]
      uniform %1 const.0: f[4, 4]
      %2: f[4] = linear(%0, %1, None, layout=nk)
      %3: f[4] = tanh(%2)
      next in.z = %3
      output td.z = %0
"""

from fastwm.row_program.lowering.draws import Draw
from fastwm.row_program.lowering.errors import NotLowerable, RowsMix
from fastwm.row_program.lowering.lowered import Lowered, lower
from fastwm.row_program.lowering.prologue import Uniform

__all__ = ["Draw", "Lowered", "NotLowerable", "RowsMix", "Uniform", "lower"]

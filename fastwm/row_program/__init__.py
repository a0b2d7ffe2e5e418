"""Row programs: a step as a short list of row-wise ops, for the fused engines.

A row program sees one row of the batch at a time. It knows no modules, no TensorDict and no batch
dims, so a tile of rows can run it from the first step to the last on its own.
"""

from fastwm.row_program.program import Input, Instr, Program, ProgramError, RowType, Sum, Val

__all__ = ["Input", "Instr", "Program", "ProgramError", "RowType", "Sum", "Val"]

"""Which tile runs so many rows; needs Triton, but no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the CPU builds of torch come without it")

from fastwm.kernels.row_program.executor import programs_for, tile_for


def test_small_batches_spread_over_the_chip() -> None:
    assert tile_for(1, 132, 736).rows == 16
    assert tile_for(16 * 132 * 2, 132, 736).rows == 16
    assert tile_for(131072, 132, 736).rows == 64


@pytest.mark.parametrize("columns", [32, 736, 2112, 2624])
@pytest.mark.parametrize("rows", [1, 64, 1024, 16384, 131072])
def test_scratch_is_bounded(rows: int, columns: int) -> None:
    """Within the 32 MB beside the results that are allowed, at any batch."""
    tile = tile_for(rows, 132, columns)
    programs = programs_for(rows, 132, tile, columns)
    assert programs * tile.rows * columns * 4 <= 32e6
    assert programs <= -(-rows // tile.rows)

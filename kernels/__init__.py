"""Triton kernels and their launchers, shipped as ``fastwm.kernels``.

Nothing here imports Triton before it is asked for: the CPU builds of torch come without it, and no module of
fastwm outside this folder may fail for the lack of it.
"""

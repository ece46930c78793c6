"""TMA descriptors as the host makes them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def test_descriptors_of_equal_layouts_differ_in_their_base_alone() -> None:
    """Triton's checks are made once for a layout, so what is remembered must be all of it."""
    primitives = pytest.importorskip("sla_compile.kernels.hopper.primitives")
    first, second = (torch.randn(2, 128, 3, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    made = [primitives.tile_descriptor(x, 64) for x in (first, second)]
    assert [descriptor.base is x for descriptor, x in zip(made, (first, second), strict=True)] == [True, True]
    assert {**vars(made[0]), "base": None} == {**vars(made[1]), "base": None}
    assert made[0].strides == [128 * 3 * 64, 64, 3 * 64, 1]
    assert primitives.tile_descriptor(first, 128).block_shape == [1, 1, 128, 64]
    assert primitives.tile_descriptor(first[:, :, :100], 64).shape == [2, 3, 100, 64]
    assert primitives.tile_descriptor(first.contiguous(), 64).strides == [3 * 128 * 64, 128 * 64, 64, 1]
    matrices = [primitives.matrix_descriptor(first.new_zeros(count, 64, 64), 64) for count in (1, 5, 5)]
    assert [matrix.shape for matrix in matrices] == [[1, 64, 64], [5, 64, 64], [5, 64, 64]]

"""Cells of voxels side by side: every layout is that of plain indexing, learned or not, and comes back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ucray.codec.cells import cells_to_volume, channels_to_volume, volume_to_cells, volume_to_channels
from ucray.grid import Shape3, triple

SHAPES = st.tuples(*[st.integers(1, 4)] * 3)
CELLS = st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def numbered(shape: Shape3, cell: Shape3, dtype: torch.dtype) -> Tensor:
    """Two volumes of so many cells whose voxels differ, as far as a dtype goes."""
    sizes = triple(n * c for n, c in zip(shape, cell, strict=True))
    random = np.random.default_rng(0)
    return torch.from_numpy(random.standard_normal((2, 1, *sizes)).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("learned", [True, False])
@given(SHAPES, CELLS, DTYPES)
def test_a_cell_has_its_voxels_row_major(
    learned: bool, shape: Shape3, cell: Shape3, dtype: torch.dtype
) -> None:
    volume = numbered(shape, cell, dtype)
    with torch.set_grad_enabled(learned):
        cells, channels = volume_to_cells(volume, cell), volume_to_channels(volume, cell)
        assert cells.dtype == channels.dtype == dtype
        for place in np.ndindex(shape):
            inside = [slice(n * c, (n + 1) * c) for n, c in zip(place, cell, strict=True)]
            wanted = volume[:, 0, inside[0], inside[1], inside[2]].reshape(2, -1)
            assert torch.equal(cells[:, place[0], place[1], place[2]], wanted)
            assert torch.equal(channels[:, :, place[0], place[1], place[2]], wanted)
        assert channels.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(cells_to_volume(cells, cell), volume)
        assert torch.equal(channels_to_volume(channels, cell), volume)
        assert torch.equal(channels_to_volume(channels.contiguous(), cell), volume)


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda volume, cell: cells_to_volume(volume_to_cells(volume, cell), cell),
        lambda volume, cell: channels_to_volume(volume_to_channels(volume, cell), cell),
    ],
)
def test_gradients_pass(there_and_back: Callable[[Tensor, Shape3], Tensor]) -> None:
    volume = numbered((2, 2, 2), (2, 2, 4), torch.float32).requires_grad_()
    weight = torch.arange(volume.numel(), dtype=torch.float32).reshape(volume.shape)
    (there_and_back(volume, (2, 2, 4)) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert volume.grad is not None
    assert torch.equal(volume.grad, weight)

"""What lapping starts from: orthogonal stages of the largest coding gain for smooth signals.

The gain is that of a first-order Markov process, the standard model of neighbouring samples, after the
stages and one Karhunen-Loeve transform for all cells of an axis, those at the faces among them (Malvar 1992,
"Signal Processing with Lapped Transforms").
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ucray.codec.lapping import Axis, Lapping

CORRELATION = 0.95
CELLS = 8
"""Cells of the axis that the gain is counted over."""

ITERATIONS = 400


def start_lapping(lapping: Lapping, undone: Lapping) -> None:
    """Set the stages of `lapping`, and of `undone` to their inverse."""
    with torch.no_grad():
        for axis, stages in lapping.axes.items():
            start = orthogonal_stages(lapping.cell["zyx".index(axis)]).state_dict()
            stages.load_state_dict(start)
            undone.axes[axis].load_state_dict({name: value.T for name, value in start.items()})


@functools.cache
def orthogonal_stages(cell: int) -> Axis:
    """The stages of an axis of cells of so many voxels, float64."""
    axis = Axis(cell).double()
    generator = torch.Generator().manual_seed(0)
    angles = {
        name: nn.Parameter(0.02 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in axis.named_parameters()
    }
    places = torch.arange(CELLS * cell, dtype=torch.float64)
    covariance = CORRELATION ** (places[:, None] - places).abs()
    optimizer = torch.optim.LBFGS(
        angles.values(), max_iter=ITERATIONS, history_size=30, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = -coding_gain(_whole(axis, angles), covariance, cell)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, value in axis.named_parameters():
            value.copy_(_orthogonal(angles[name]))
    return axis.requires_grad_(False)


def coding_gain(whole: Tensor, covariance: Tensor, cell: int) -> Tensor:
    """Of a filtered axis, in dB over samples coded one by one; scalar."""
    filtered = whole @ covariance @ whole.T
    cells = len(whole) // cell
    mean = filtered.view(cells, cell, cells, cell).diagonal(dim1=0, dim2=2).mean(dim=-1)
    return -torch.logdet(mean) / cell * (10.0 / math.log(10.0))


def _whole(axis: Axis, angles: dict[str, nn.Parameter]) -> Tensor:
    turned = {name: _orthogonal(value) for name, value in angles.items()}
    size = CELLS * len(angles["0.inner"])
    return torch.as_tensor(torch.func.functional_call(axis, turned, (size,)))


def _orthogonal(angles: Tensor) -> Tensor:
    upper = angles.triu(1)
    return torch.as_tensor(torch.linalg.matrix_exp(upper - upper.T))

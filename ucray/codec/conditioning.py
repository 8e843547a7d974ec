"""What depends on the quality: tables with one row for each of a few qualities, interpolated between.

One set of weights serves every rate: each layer of the networks, and the gain of each latent, may
differ smoothly from the coarsest quality to the finest.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ucray.codec.convolution import Convolution, finished
from ucray.config import QUALITIES

KEPT = 16
"""Qualities for which a layer keeps its kernels: chunks of an archive have few, one or its neighbours."""

KNOTS = 9
"""Trained qualities; between them a table is linear."""


def at_quality(table: Tensor, quality: Tensor) -> Tensor:
    """Rows (batch, width) of a table (KNOTS, width) at qualities (batch,) from 0 to QUALITIES - 1."""
    place = quality.clamp(0, QUALITIES - 1) * ((KNOTS - 1) / (QUALITIES - 1))
    knots = torch.arange(KNOTS, device=table.device)
    share = (1.0 - (place[:, None] - knots).abs()).clamp_min(0.0)
    return (share[:, :, None] * table).sum(dim=1)


class QualityAffine(nn.Module):
    """Scales and shifts each channel by the quality; starts as no change (Perez et al. 2018, FiLM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(KNOTS, width))
        self.shift = nn.Parameter(torch.zeros(KNOTS, width))
        self._kept: dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]] = {}

    def train(self, mode: bool = True) -> Self:
        """As of every module; what was kept while nothing was learned is dropped."""
        self._kept.clear()
        return super().train(mode)

    def behind(
        self,
        convolution: Convolution,
        x: Tensor,
        quality: Tensor,
        *,
        relu: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Convolved features, scaled and shifted; with a ReLU, or added onto others, which are lost.

        Of a single chunk all of it is done within the convolution.
        """
        if len(x) > 1 or torch.is_grad_enabled():
            return finished(torch.as_tensor(self(convolution(x), quality)), relu=relu, onto=onto)
        return convolution.with_weights(x, *self._folded(convolution, quality, x.dtype), relu=relu, onto=onto)

    def _folded(self, convolution: Convolution, quality: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution, scaled and shifted; kept where nothing is learned any more."""
        assert convolution.bias is not None
        key = float(quality), dtype
        if key in self._kept:
            return self._kept[key]
        scale, shift = (table[0] for table in self.at(quality))
        bias = convolution.bias * scale + shift
        folded = (convolution.weight * scale[:, None, None, None, None]).to(dtype), bias.to(dtype)
        if not self.training:
            if len(self._kept) >= KEPT:
                # Another thread may be looking for one: it finds it, or makes it again.
                self._kept = {}
            self._kept[key] = folded
        return folded

    def at(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and shifts (batch, width) at qualities (batch,)."""
        return 1.0 + at_quality(self.scale, quality), at_quality(self.shift, quality)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """Features (batch, width, ...) at qualities (batch,)."""
        scale, shift = (table[:, :, None, None, None] for table in self.at(quality))
        return torch.addcmul(shift, x, scale)

"""The prior on the latents while it is trained: mean, scale and quality gain, in floats.

Every codebook code holds, for each latent under it, an addend to the latent's mean and to the log
of its scale. Training works on floats with a differentiable estimate of the rate; `to_integers`
turns the trained prior into the whole-number tables that alone may steer the entropy coder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.entropy import SCALE_UNITS, TABLE_OCTAVES
from ucray.config import QUALITIES, CodecConfig

KNOTS = 9
"""Trained points of the quality gain; between them its logarithm is linear."""

COARSEST_LAMBDA = 12.0
FINEST_LAMBDA = 0.006
"""Weights of a bit per voxel against squared error (in variances of the volume) at both ends."""


def lambda_of(quality: float) -> float:
    """Weight of rate against distortion at a quality from 0 (coarsest) to QUALITIES - 1."""
    share = quality / (QUALITIES - 1)
    return float(COARSEST_LAMBDA * (FINEST_LAMBDA / COARSEST_LAMBDA) ** share)


@dataclass(frozen=True)
class IntegerPrior:
    """The prior as whole numbers; see `ucray.codec.entropy.StreamTables` for their meaning."""

    mean: npt.NDArray[np.int8]
    mean_step: npt.NDArray[np.float32]
    scale: npt.NDArray[np.int8]
    base: npt.NDArray[np.int16]
    gain: npt.NDArray[np.int16]


class LatentPrior(nn.Module):
    """Trainable tables; `codes` are (batch, stages, z, y, x) on the grid of codes.

    A table entry is the sum of a free number and of a linear function of the code's codebook
    entry. The latter is shared by all codes, so it learns from every batch, and it carries the
    gradient of the rate back to the side latents; as it is linear, it still is a sum over stages.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.code_stride = config.code_stride
        cells = math.prod(config.code_stride)
        shape = (config.code_stages, config.codes, cells * config.latents)
        self.latents = config.latents
        self.mean = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.base = nn.Parameter(torch.zeros(config.latents))
        self.head = nn.Linear(config.code_width, 2 * cells * config.latents, bias=False)
        nn.init.zeros_(self.head.weight)
        knots = torch.tensor([lambda_of(k * (QUALITIES - 1) / (KNOTS - 1)) for k in range(KNOTS)])
        # High-rate theory: a uniform quantiser of step D has slope dD/dR of D^2 ln(2) / 6.
        step = (knots * 6.0 / math.log(2.0)).sqrt()
        self.log_gain = nn.Parameter((-step.log2())[:, None].repeat(1, config.latents))

    def forward(self, codes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log2 scale of every latent: (batch, latents, ...) on the latent grid.

        `vectors` (batch, z, y, x, code_width) are the codebook's entries for `codes`.
        """
        mean, log_scale = self.head(vectors).chunk(2, dim=-1)
        mean = self._spread(mean + _chosen(self.mean, codes))
        log_scale = self._spread(log_scale + _chosen(self.log_scale, codes))
        return mean, log_scale + self.base[None, :, None, None, None]

    def gain_at(self, quality: Tensor) -> Tensor:
        """log2 gain (batch, latents) at qualities (batch,) from 0 to QUALITIES - 1."""
        place = quality.clamp(0, QUALITIES - 1) * ((KNOTS - 1) / (QUALITIES - 1))
        lower = place.floor().clamp(max=KNOTS - 2)
        share = (place - lower)[:, None]
        below = lower.long()
        return self.log_gain[below] * (1 - share) + self.log_gain[below + 1] * share

    def start(self, latent_scale: Tensor) -> None:
        """Start from latents of known standard deviation (latents,), the same for all codes."""
        # A logistic of scale s has a standard deviation of s * pi / sqrt(3).
        with torch.no_grad():
            self.base.copy_((latent_scale * math.sqrt(3.0) / math.pi).log2())

    def fold(self, entries: Tensor) -> None:
        """Move the linear part into the tables, given codebook entries (stages, codes, width)."""
        with torch.no_grad():
            mean, log_scale = self.head(entries).chunk(2, dim=-1)
            self.mean.add_(mean)
            self.log_scale.add_(log_scale)
            self.head.weight.zero_()

    def to_integers(self) -> IntegerPrior:
        """Round the folded tables to what the stream stores."""
        with torch.no_grad():
            reach = self.mean.reshape(*self.mean.shape[:2], -1, self.latents).abs().amax(dim=(0, 1, 2))
            step = (reach / 127.0).clamp_min(1e-6)
            mean = self.mean.reshape(*self.mean.shape[:2], -1, self.latents) / step
            scale = self.log_scale.reshape(mean.shape) * SCALE_UNITS
            gain = self.gain_at(torch.arange(QUALITIES, dtype=torch.float32))
            return IntegerPrior(
                mean=mean.round().clamp(-127, 127).to(torch.int8).cpu().numpy(),
                mean_step=step.float().cpu().numpy(),
                scale=scale.round().clamp(-127, 127).to(torch.int8).cpu().numpy(),
                base=(self.base * SCALE_UNITS).round().to(torch.int16).cpu().numpy(),
                gain=(gain * SCALE_UNITS).round().to(torch.int16).cpu().numpy(),
            )

    def _spread(self, cells: Tensor) -> Tensor:
        """(batch, z, y, x, cells * latents) on the grid of codes to (batch, latents, Z, Y, X)."""
        batch, z, y, x, _ = cells.shape
        a, b, c = self.code_stride
        cells = cells.reshape(batch, z, y, x, a, b, c, self.latents)
        return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, self.latents, z * a, y * b, x * c)


def _chosen(table: Tensor, codes: Tensor) -> Tensor:
    rows = [functional.embedding(code, entries) for entries, code in zip(table, codes.unbind(1), strict=True)]
    return torch.stack(rows).sum(dim=0)


def rate_in_bits(values: Tensor, log_scale: Tensor) -> Tensor:
    """Bits of quantised values under a logistic prior of mean zero; same shape as `values`.

    `values` carry uniform noise in place of rounding (Balle et al. 2017, section 3), `log_scale` is
    the log2 of the logistic's scale. Scales below the finest table stay trainable upwards.
    """
    low, high = TABLE_OCTAVES
    bounded = log_scale.clamp(low, high)
    scale = torch.exp2(bounded + 0.01 * (log_scale - bounded))
    size = values.abs()
    # In the lower tail both terms are small and their difference keeps its precision.
    mass = torch.sigmoid((0.5 - size) / scale) - torch.sigmoid((-0.5 - size) / scale)
    return -torch.log2(mass.clamp_min(1e-9))

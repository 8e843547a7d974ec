"""What stands in the place of fill voxels for the networks: smooth, and of no cost to the stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def inpaint(values: Tensor, mask: Tensor) -> Tensor:
    """Replace masked values of (batch, 1, z, y, x) by averages of what is near and not masked.

    Averages come from ever coarser halvings of the volume, so the result is smooth far from tissue
    and costs the stream nothing. Entirely masked chunks become zero.
    """
    if not bool(mask.any()):
        return values
    weight = (~mask).to(values.dtype)
    return _fill_from_coarser(torch.where(mask, torch.zeros_like(values), values), weight)


def _fill_from_coarser(values: Tensor, weight: Tensor) -> Tensor:
    if min(values.shape[2:]) < 2:
        total = weight.sum(dim=(2, 3, 4), keepdim=True)
        mean = values.sum(dim=(2, 3, 4), keepdim=True) / total.clamp_min(1e-6)
        return torch.where(weight > 0, values / weight.clamp_min(1e-6), mean.expand_as(values))
    coarse_weight = functional.avg_pool3d(weight, 2, ceil_mode=True, count_include_pad=False)
    coarse_values = functional.avg_pool3d(values, 2, ceil_mode=True, count_include_pad=False)
    coarse = _fill_from_coarser(coarse_values, coarse_weight)
    wide = functional.interpolate(coarse, size=values.shape[2:], mode="trilinear", align_corners=False)
    return torch.where(weight > 0, values / weight.clamp_min(1e-6), wide)

"""What the post-filter will add to a chunk, taken off its latents before they are rounded.

::

    y --rounded one by one--> synthesis --> x_hat --post-filter--(-)--> change --analysis--> (share)--(-)--> y
                                              +-------------------^

A filter behind a decoder also moves what was coded right. An encoder that knows the filter can aim beside
the latents, so that the sum of both meets them. What the filter adds depends on what is coded, which is not
known yet: a rounding without contexts and paths tells most of it, and as the rest changes with
every symbol, only a share is taken off. A decoder is not concerned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ucray.codec.linear import LinearAnalysis, LinearSynthesis

SHARE = 0.55
"""Of what the filter adds to a roughly coded chunk, what is taken off."""

DEAD_ZONE = 0.9
"""Latents below so many steps are zero in the rough rounding: paths send few of them."""


def anticipated(
    y: Tensor,
    prior: Tensor,
    quality: Tensor,
    step: Tensor,
    analysis: LinearAnalysis,
    synthesis: LinearSynthesis,
) -> Tensor:
    """Latents (batch, latents, z, y, x) to round in place of `y`; `y` itself where nothing is filtered.

    Parameters
    ----------
    y, prior, quality
        Latents, codebook vectors and qualities, as the synthesis reads them.
    step
        Of a rounding one by one (batch, latents), in units of `y`.
    """
    used = synthesis.is_filtered(quality)
    if not bool(used.any()):
        return y
    step = step[:, :, None, None, None]
    rough = (y.abs() / step + (1.0 - DEAD_ZONE)).floor().mul_(step).copysign_(y)
    assert synthesis.postfilter is not None
    added = synthesis.postfilter.change(synthesis.unfiltered(rough, prior, quality), quality)
    change = analysis.latents(added).float()
    return torch.where(used[:, None, None, None, None], y - SHARE * change, y)

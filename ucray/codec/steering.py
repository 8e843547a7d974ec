"""Steering: latents moved before they are rounded, so that what a tracer finds moves less.

::

    latents + shift --rounded--> decoded voxels --tracer--> what it finds --gradient--+
                ^---------------------------------------------------------------------+

Latents that are rounded by their weights err each for itself. Of many errors that a membrane sees together
the sum counts, and a small shift of some lets it vanish. Rounding has no gradient: the shift follows that of
the decoded voxels, as if there were none (Bengio et al. 2013, "Estimating or propagating gradients through
stochastic neurons for conditional computation"). Bytes and error of voxels stay nearly what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.fill import fill_mask
from ucray.codec.importance import Weights
from ucray.codec.scenes import distance_gradient, scenes
from ucray.codec.threads import one_thread
from ucray.codec.tracer import SEEN, TracerNetwork
from ucray.errors import WeightsError
from ucray.grid import Box, triple

RATES = (0.08, 0.065, 0.05, 0.04, 0.032, 0.025, 0.02, 0.015)
"""Of each step, the share of what would undo a latent's own part in what the tracer finds."""

LEAST_STEERED = 2.0
"""Least weight by which a step is divided, of the mean."""


@dataclass(frozen=True)
class View:
    """A chunk and what lies around it: voxels (z, y, x), the chunk's box in them, weights of its latents."""

    voxels: npt.NDArray[np.generic]
    box: Box
    weights: Weights


class Steering:
    """Weighs and steers the chunks of one encoder by one tracer."""

    def __init__(self, encoder: ChunkEncoder, tracer: TracerNetwork) -> None:
        self._encoder = encoder
        self._tracer = tracer.to(str(encoder.device))
        self._scale = encoder.format.scale / tracer.normaliser.scale

    def view(self, voxels: npt.NDArray[np.generic], box: Box) -> View:
        """A chunk in a box of voxels (z, y, x), with what the tracer sees around it.

        Raises WeightsError if the tracer says what is no number.
        """
        around = box.grown(SEEN).clipped(triple(iter(voxels.shape)))
        voxels, box = voxels[around.slices], box.relative_to(around)
        filled = fill_mask(voxels[box.slices], self._encoder.format.fill_value)
        found = self._encoder.sensitivity.seen_by(self._tracer, voxels, box, filled)
        return View(voxels, box, _numbers(found))

    def steered(self, prepared: Prepared, view: View, quality: int, mean: float) -> Prepared:
        """A prepared and weighed chunk, steered where the volume's quality is `quality`.

        `mean` is the volume's mean weight. Raises WeightsError if the tracer says what is no number.
        """
        if not prepared.neural:
            return prepared
        with one_thread(self._encoder.device):
            return self._steered(prepared, view, quality, mean)

    def _steered(self, prepared: Prepared, view: View, quality: int, mean: float) -> Prepared:
        encoder = self._encoder
        (latents,) = encoder.latents([prepared.voxels], [prepared.quality(quality)])
        seen = scenes(self._tracer, view.voxels, view.box)
        least = np.float32(LEAST_STEERED * mean)
        # Gradients are along voxels in the tracer's units, latents in whole ones of voxels in the chunk's.
        unit = np.float32(self._scale) * encoder.stream.context.unit
        curvature = np.square(np.maximum(view.weights, least)) * unit
        filled = fill_mask(prepared.voxels, encoder.format.fill_value)
        inside = tuple(slice(n) for n in prepared.voxels.shape)
        now = view.voxels.copy()
        shift = np.zeros_like(latents.values)
        for step, rate in enumerate(RATES):
            decoded = encoder.decoded(replace(prepared, shift=shift), latents, quality)[inside]
            now[view.box.slices] = np.where(filled, prepared.voxels, decoded)
            gradient = distance_gradient(self._tracer, seen, now, view.box, step)
            gradient[filled] = 0.0
            shift -= np.float32(rate) * encoder.sensitivity.along(gradient) / curvature
        return replace(prepared, shift=_numbers(shift))


def _numbers(found: Weights) -> Weights:
    """What is found, where it can be used: a shift that is none would take the chunk with it."""
    if not np.isfinite(found).all():
        raise WeightsError("the tracer finds what is no number: it has not learnt, or is damaged")
    return found

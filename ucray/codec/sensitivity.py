"""Sensitivity: how much what a network says of voxels changes with the error of each latent.

::

    gradients --analysis--> what a latent changes, draw by draw --root of mean square--> weights of latents

A network's outputs, each divided by its deviation and with a random sign, are one number; its gradient is
along a latent what the latent's error changes, and the square's mean over signs is the sum over all outputs
(Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"). With outputs that are
probabilities this is their Fisher information, which says how far small errors move them. Weights are its
roots, as few draws say little of one latent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ucray.codec.fill import Mask
from ucray.codec.importance import Weights
from ucray.codec.linear import LinearAnalysis
from ucray.codec.threads import one_thread
from ucray.codec.tracer import TracerNetwork
from ucray.grid import Box, Shape3, triple

Gradients = npt.NDArray[np.float32]
"""Of one number for each draw of signs, along voxels: (draws, z, y, x)."""

DRAWS = 2
"""Of signs, by which errors are weighed: each takes a network's way back, and more say the same."""

SEED = 0

NOISE_CHUNKS = 8
"""Chunks of noise by which the sizes of latents are measured."""


class Sensitivity:
    """Weights of a chunk's latents from gradients of what a network says of its voxels."""

    def __init__(self, analysis: LinearAnalysis, chunk: Shape3) -> None:
        self._analysis = analysis
        self._chunk = chunk
        random = torch.Generator().manual_seed(0)
        # One by one: a chunk may be large.
        noise = (torch.randn(1, 1, *chunk, generator=random) for _ in range(NOISE_CHUNKS))
        self._size = sum(self._squares(one).mean(axis=(0, 1, 2)) for one in noise) / NOISE_CHUNKS

    def of(self, gradients: Gradients, filled: Mask) -> Weights:
        """Weights (z, y, x, latents) from gradients (draws, z, y, x) of a chunk, or of what there is of it.

        They are 1 for gradients of white noise of deviation 1. Errors of voxels that are `filled` (z, y, x)
        never show. Cells of nothing else, or beyond the volume, weigh as others do on the mean.
        """
        inside = tuple(slice(n) for n in filled.shape)
        shown = np.zeros(self._chunk, bool)
        shown[inside] = ~filled
        whole = np.zeros((len(gradients), *self._chunk), np.float32)
        whole[:, *inside] = gradients * ~filled
        found: Weights = np.sqrt(self._squares(torch.from_numpy(whole)[:, None]) / self._size)
        kept = _any_in_cells(shown, triple(iter(found.shape[:3])))
        if kept.any():
            found[~kept] = found[kept].mean(axis=0)
        return found

    def seen_by(
        self, tracer: TracerNetwork, voxels: npt.NDArray[np.generic], box: Box, filled: Mask
    ) -> Weights:
        """Weights (z, y, x, latents) of a chunk in a box of voxels (z, y, x), which are seen around it."""
        with one_thread(next(self._analysis.parameters()).device):
            return self.of(tracer.gradients(voxels, box, draws=DRAWS, seed=SEED), filled)

    def along(self, gradient: npt.NDArray[np.float32]) -> Weights:
        """A gradient (z, y, x) of a chunk, or of what there is of it, along latents (z, y, x, latents)."""
        missing = [(0, c - n) for n, c in zip(gradient.shape, self._chunk, strict=True)]
        whole = torch.from_numpy(np.pad(gradient, missing))[None, None]
        with torch.inference_mode():
            along = self._analysis.latents(whole.to(next(self._analysis.parameters()).device))
        return np.asarray(along[0].float().permute(1, 2, 3, 0).cpu().numpy())

    def _squares(self, gradients: torch.Tensor) -> Weights:
        with torch.inference_mode():
            along = self._analysis.latents(gradients.to(next(self._analysis.parameters()).device))
            squares = along.float().square().mean(dim=0).permute(1, 2, 3, 0)
        return np.asarray(squares.cpu().numpy())


def _any_in_cells(mask: Mask, cells: Shape3) -> Mask:
    """Whether anything of a mask (z, y, x) is set in each of so many cells."""
    split = [n for size, count in zip(mask.shape, cells, strict=True) for n in (count, size // count)]
    return np.asarray(mask.reshape(split).any(axis=(1, 3, 5)))

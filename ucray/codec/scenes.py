"""Scenes: what a tracer finds in a chunk, and which way it has moved once the chunk is decoded.

::

    original --mirror images--> mean probability --asin(sqrt(p))--> angles
                                                                       |
    decoded --one mirror image--> probability --asin(sqrt(p))--> angles less those: how far, and its gradient

A tracer says of a volume what it says on the mean over its mirror images, which is nearer to the truth than
what it says of one: errors of one image are none of another. So that mean is what a decoded chunk is to
show, and it is looked at in another image at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.codec.tracer import MIRRORED, TracerNetwork, logits_of, mirrored, said_by, tiles
from ucray.grid import Box, triple

LARGEST_LOGIT = 60.0
"""Beyond it a probability is 0 or 1."""


@dataclass(frozen=True)
class Scene:
    """What is found in a tile of voxels and around it: angles (1, 1, z, y, x) of what is `around`."""

    tile: Box
    around: Box
    angles: Tensor


def scenes(tracer: TracerNetwork, voxels: npt.NDArray[np.generic], box: Box) -> list[Scene]:
    """What a tracer finds in and around a box of voxels (z, y, x), tile by tile."""
    found = []
    for tile, around in tiles(tracer.network, box, triple(iter(voxels.shape))):
        said = said_by(tracer.network, tracer.input_of(voxels[around.slices]))
        found.append(Scene(tile, around, angles_of(said.logit())))
    return found


def distance_gradient(
    tracer: TracerNetwork,
    seen: Sequence[Scene],
    voxels: npt.NDArray[np.generic],
    box: Box,
    image: int = 0,
) -> npt.NDArray[np.float32]:
    """Gradient (z, y, x), along voxels of a box, of how far what is found in them is from what was.

    They are looked at in one of the mirror images, whose numbers go round. The distance is twice the square
    of what the angles asin(sqrt(p)) of probabilities have turned; where they turn little it is half the
    Fisher information of the change.
    """
    axes = MIRRORED[image % len(MIRRORED)]
    found = np.empty(box.shape, np.float32)
    for scene in seen:
        x = tracer.input_of(voxels[scene.around.slices]).requires_grad_()
        turned = angles_of(logits_of(tracer.network, mirrored(x, axes)).flip(axes)) - scene.angles
        (gradient,) = torch.autograd.grad(2.0 * turned.square().sum(), x)
        inside = scene.tile.relative_to(scene.around).slices
        found[scene.tile.relative_to(box).slices] = gradient[0, 0].cpu().numpy()[inside]
    return found


def angles_of(logits: Tensor) -> Tensor:
    """Angles asin(sqrt(p)), from 0 to pi / 2, of probabilities."""
    return (0.5 * logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)).exp().atan()

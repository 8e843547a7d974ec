"""Membranes found by a U-Net that learns in some minutes of two cores.

::

    voxels --> cells of 2^3 --> blocks ------------------------(+)--> blocks --> membrane, or not
                                   +--> half as fine --> blocks --^       +----> of one neuron, or not

Beside membranes it learns whether voxels some way apart belong to one neuron, which makes it look further
(Ronneberger et al. 2015, "U-Net"; Lee et al. 2017, "Superhuman accuracy on the SNEMI3D connectomics
challenge"). It is taught with crops turned, blurred, noisy and of other contrast: what a microscope or a
codec does to tissue, but no codec itself.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.bench.crops import Crops, offsets
from ucray.bench.samples import blocks
from ucray.bench.tissue import Features, Finder, Lesson, Normaliser, Probability, Volume
from ucray.codec.allocator import keep_freed_memory
from ucray.codec.postfilter import fast_in_bfloat16
from ucray.grid import Shape3, triple

WIDTHS = (32, 64, 96)
"""Channels on cells, on cells twice as large, and on those four times as large."""

STRIDE = 8
"""Voxels along an axis that a coarsest cell has, where sections are thin."""

GROUPS = 8
"""Of channels that are normalised together."""

APART_WEIGHT = 0.1
"""Of each pair of voxels apart in the loss, where membranes have 1."""

CROPS = 2
"""Of a step."""

RATE, WARMING, LAST = 2e-3, 100, 0.01
"""Largest learning rate, steps until it is reached, and the last one's share."""

GRADIENT_TILE: Shape3 = (80, 80, 80)
"""Voxels of which gradients are found together, which takes a gigabyte; a multiple of STRIDE."""

SEEN = 16
"""Voxels around these, and a multiple of STRIDE too: the network hardly looks further."""

KEPT = 0.998
"""Of the mean of all steps' numbers at each step."""


class Block(nn.Module):
    """x plus two convolutions, each behind a ReLU of normalised features; starts as no change."""

    def __init__(self, width: int, kernel: Shape3) -> None:
        super().__init__()
        padding = triple(k // 2 for k in kernel)
        self.before = nn.GroupNorm(GROUPS, width)
        self.open = nn.Conv3d(width, width, kernel, padding=padding)
        self.between = nn.GroupNorm(GROUPS, width)
        self.close = nn.Conv3d(width, width, kernel, padding=padding)
        nn.init.zeros_(self.close.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.open(functional.relu(self.before(x)))
        return x + torch.as_tensor(self.close(functional.relu(self.between(inner))))


class MembraneNetwork(nn.Module):
    """Normalised voxels (batch, 1, z, y, x), multiples of STRIDE, to logits of the same shape."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        kernel: Shape3 = (1, 3, 3) if flat else (3, 3, 3)
        half: Shape3 = (1, 2, 2) if flat else (2, 2, 2)
        fine, middle, coarse = WIDTHS

        def blocks(width: int, count: int) -> nn.Sequential:
            return nn.Sequential(*[Block(width, kernel) for _ in range(count)])

        self.stem = nn.Conv3d(
            1, fine, triple(2 * n if n > 1 else 1 for n in half), half, triple(n // 2 for n in half)
        )
        self.first = nn.Conv3d(fine, fine, kernel, padding=triple(k // 2 for k in kernel))
        self.fine, self.fine_again = blocks(fine, 2), blocks(fine, 2)
        self.to_middle = nn.Conv3d(fine, middle, half, half)
        self.middle, self.middle_again = blocks(middle, 2), blocks(middle, 1)
        self.to_coarse = nn.Conv3d(middle, coarse, half, half)
        self.coarse = blocks(coarse, 2)
        self.from_coarse = nn.ConvTranspose3d(coarse, middle, half, half)
        self.from_middle = nn.ConvTranspose3d(middle, fine, half, half)
        self.membrane = nn.ConvTranspose3d(fine, 1, half, half)
        self.apart = nn.ConvTranspose3d(fine, len(offsets(flat)), half, half)

    def features(self, x: Tensor) -> Tensor:
        """Features (batch, width, ...) of cells."""
        fine = self.fine(self.first(functional.relu(self.stem(x))))
        middle = self.middle(self.to_middle(fine))
        middle = self.middle_again(middle + self.from_coarse(self.coarse(self.to_coarse(middle))))
        return torch.as_tensor(self.fine_again(fine + self.from_middle(middle)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.membrane(self.features(x)))

    def both(self, x: Tensor) -> Tensor:
        """Logits (batch, 1 + offsets, z, y, x) of membranes, and of neurons that differ across offsets."""
        features = self.features(x)
        return torch.cat([self.membrane(features), self.apart(features)], dim=1)


@dataclass(frozen=True)
class NetworkSight:
    """How voxels are looked at: normalised, if `flat` section by section; networks learn in `steps`."""

    normaliser: Normaliser
    flat: bool
    steps: int

    @classmethod
    def of(cls, volume: Volume, *, flat: bool, steps: int) -> NetworkSight:
        """As suits a volume."""
        return cls(Normaliser.of(volume), flat, steps)

    def features(self, volume: Volume) -> Features:
        """Normalised voxels (z, y, x, 1)."""
        return self.normaliser.normalised(volume)[..., None]

    def learnt(self, lesson: Lesson, *, seed: int) -> tuple[Finder, Probability]:
        """A network, and what it says of the voxels that it learnt from.

        It may be surer of these than of others; one that has not seen them would take as long again.
        """
        keep_freed_memory()
        shape, segments = lesson.membrane.shape, lesson.segments
        neurons = np.zeros(shape, np.int32) if segments is None else segments.astype(np.int32)
        random = np.random.default_rng(seed)
        crops = Crops(lesson.features[..., 0], lesson.membrane, lesson.known, neurons, self.flat, random)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MembraneNetwork(flat=self.flat)
        find = NetworkFinder(_taught(network, crops, self.steps))
        return find, find(lesson.features)


@dataclass(frozen=True)
class NetworkFinder:
    """Says how probably a voxel is membrane, and which errors of voxels change that."""

    network: MembraneNetwork

    def __call__(self, features: Features) -> Probability:
        return _found(self.network, features[..., 0])

    def gradients(self, features: Features, *, draws: int, seed: int) -> npt.NDArray[np.float32]:
        """Gradients (draws, z, y, x), along voxels, of all probabilities with random signs.

        Each is divided by its deviation, the root of p (1 - p): mean squares along an error are Fisher
        information.
        """
        voxels = features[..., 0]
        shape = triple(iter(voxels.shape))
        found = np.empty((draws, *shape), np.float32)
        signs = torch.Generator().manual_seed(seed)
        for box in blocks(shape, GRADIENT_TILE):
            # What lies beyond a tile says nothing of it but through what the network sees around it.
            low = triple(max(a - SEEN, 0) for a in box.start)
            wide = tuple(slice(a, b + SEEN) for a, b in zip(low, box.stop, strict=True))
            inside = box.shifted(triple(-a for a in low)).slices
            x = _padded(torch.from_numpy(np.ascontiguousarray(voxels[wide]))[None, None]).requires_grad_()
            with _fewer_bits():
                logits = self.network(x).float()
            probability = logits.detach().sigmoid()
            deviation = (probability * (1.0 - probability)).sqrt()
            for draw in range(draws):
                sign = torch.randint(0, 2, logits.shape, generator=signs) * 2 - 1
                total = (logits * deviation * sign).sum()
                (gradient,) = torch.autograd.grad(total, x, retain_graph=draw + 1 < draws)
                found[(draw, *box.slices)] = gradient[0, 0].numpy()[inside]
        return found


def _taught(network: MembraneNetwork, crops: Crops, steps: int) -> MembraneNetwork:
    """The mean of a network's numbers over the steps of its training."""
    parameters = list(network.parameters())
    kept = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=1e-4)
    for step in range(steps):
        warmed = min(1.0, (step + 1) / WARMING)
        share = 0.5 * (1.0 + math.cos(math.pi * step / steps)) * (1.0 - LAST) + LAST
        for group in optimiser.param_groups:
            group["lr"] = RATE * warmed * share
        x, targets, known = (torch.stack(parts).float() for parts in zip(*_step(crops), strict=True))
        with _fewer_bits():
            logits = network.both(_padded(x))
        logits = logits[..., : x.shape[2], : x.shape[3], : x.shape[4]].float()
        lost = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known
        each = lost.sum((0, 2, 3, 4)) / known.sum((0, 2, 3, 4)).clamp_min(1.0)
        optimiser.zero_grad()
        (each[0] + APART_WEIGHT * each[1:].sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            # The first steps are forgotten at once.
            share = 1.0 - min(KEPT, (step + 1) / (step + 10))
            for mean, now in zip(kept.parameters(), parameters, strict=True):
                mean.lerp_(now, share)
    return kept.eval().requires_grad_(False)


def _step(crops: Crops) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return (crops.drawn() for _ in range(CROPS))


def _found(network: MembraneNetwork, voxels: npt.NDArray[np.float32]) -> Probability:
    """Probability of membranes: the mean over a volume and its seven mirror images."""
    x = _padded(torch.from_numpy(np.ascontiguousarray(voxels))[None, None])
    total = torch.zeros_like(x)
    images = [
        tuple(2 + axis for axis in range(3) if back[axis])
        for back in itertools.product((False, True), repeat=3)
    ]
    with torch.inference_mode(), _fewer_bits():
        for back in images:
            total += network(_flipped(x, back)).float().sigmoid().flip(back)
    inside = tuple(slice(n) for n in voxels.shape)
    return np.asarray((total / len(images))[0, 0].numpy()[inside])


def _flipped(x: Tensor, back: tuple[int, ...]) -> Tensor:
    return x.flip(back).contiguous(memory_format=torch.channels_last_3d)


def _padded(x: Tensor) -> Tensor:
    """Voxels (batch, 1, z, y, x) that go on beyond their ends to a multiple of STRIDE."""
    missing = [n for size in reversed(x.shape[2:]) for n in (0, -size % STRIDE)]
    padded = functional.pad(x, missing, mode="replicate")
    return padded.contiguous(memory_format=torch.channels_last_3d)


def _fewer_bits() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_in_bfloat16())

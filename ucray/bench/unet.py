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
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from ucray.bench.tissue import Features, Finder, Labels, Probability, Volume
from ucray.codec.allocator import keep_freed_memory
from ucray.codec.postfilter import fast_in_bfloat16
from ucray.grid import Shape3, triple

WIDTHS = (32, 64, 96)
"""Channels on cells, on cells twice as large, and on those four times as large."""

GROUPS = 8
"""Of channels that are normalised together."""

APART = (1, 3, 9)
"""Voxels between those that may belong to one neuron."""

APART_WEIGHT = 0.1
"""Of each of these in the loss, where membranes have 1."""

CROP, CROPS = 64**3, 2
"""Voxels of a crop, and crops of a step; at thick sections they are of few of them."""

THIN = 8
"""Sections of a crop where they are thick; what they are padded to along every axis is as much."""

RATE, WARMING, LAST = 2e-3, 100, 0.01
"""Largest learning rate, steps until it is reached, and the last one's share."""

KEPT = 0.998
"""Of the mean of all steps' numbers at each step."""

BLURRED, LARGEST_BLUR = 0.7, 1.5
"""Share of the crops, and deviation in voxels."""

NOISY, LARGEST_NOISE = 0.5, 0.5
"""Share of the crops, and deviation in those of the volume."""

CONTRAST, BRIGHTNESS = 0.2, 0.2
"""Largest change of a crop's deviation, and of its mean, in deviations of the volume."""


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
    """Normalised voxels (batch, 1, z, y, x), multiples of THIN, to logits of the same shape."""

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


def offsets(flat: bool) -> list[tuple[int, int]]:
    """Axes, and voxels along them, across which neurons are compared."""
    return [(axis, distance) for distance in APART for axis in ((1, 2) if flat else (0, 1, 2))]


@dataclass(frozen=True)
class NetworkSight:
    """How voxels are looked at: normalised, if `flat` section by section; networks learn in `steps`."""

    offset: float
    scale: float
    flat: bool
    steps: int

    @classmethod
    def of(cls, volume: Volume, *, flat: bool, steps: int) -> NetworkSight:
        """As suits a volume."""
        return cls(float(volume.mean()), float(volume.std()) or 1.0, flat, steps)

    def features(self, volume: Volume) -> Features:
        """Normalised voxels (z, y, x, 1)."""
        values = (volume.astype(np.float32) - np.float32(self.offset)) / np.float32(self.scale)
        return values.astype(np.float32)[..., None]

    def learnt(
        self,
        features: Features,
        membrane: npt.NDArray[np.bool_],
        known: npt.NDArray[np.bool_],
        segments: Labels | None,
        *,
        seed: int,
    ) -> tuple[Finder, Probability]:
        """A network, and what it says of the voxels that it learnt from.

        It is not much surer of these than of others: no crop was ever the same.
        """
        keep_freed_memory()
        neurons = np.zeros(membrane.shape, np.int64) if segments is None else segments
        crops = _Crops(features[..., 0], membrane, known, neurons, self.flat, np.random.default_rng(seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MembraneNetwork(flat=self.flat)
        network = _taught(network, crops, self.steps)

        def find(features: Features) -> Probability:
            return _found(network, features[..., 0])

        return find, find(features)


@dataclass(frozen=True)
class _Crops:
    """What a network is shown: normalised voxels with what is known of them (z, y, x)."""

    voxels: npt.NDArray[np.float32]
    membrane: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    segments: Labels
    flat: bool
    random: np.random.Generator

    @property
    def size(self) -> Shape3:
        """Of a crop: a cube, or of few sections where these are thick; no larger than the volume."""
        deep = THIN if self.flat else round(CROP ** (1 / 3))
        wide = math.isqrt(CROP // deep)
        return triple(min(n, most) for n, most in zip(self.voxels.shape, (deep, wide, wide), strict=True))

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """One crop (1, z, y, x), with targets and where these are known (1 + offsets, z, y, x)."""
        random = self.random
        starts = [int(random.integers(n - m + 1)) for n, m in zip(self.voxels.shape, self.size, strict=True)]
        here = tuple(slice(start, start + m) for start, m in zip(starts, self.size, strict=True))
        axes = self._order()
        back = tuple(axis for axis in range(3) if random.random() < 0.5)

        def turned(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            return np.ascontiguousarray(np.flip(values[here].transpose(axes), back))

        voxels = self._changed(turned(self.voxels).astype(np.float32))
        segments = torch.from_numpy(turned(self.segments).astype(np.int64))
        targets = [torch.from_numpy(turned(self.membrane).astype(np.float32))]
        known = [torch.from_numpy(turned(self.known).astype(np.float32))]
        for axis, distance in offsets(self.flat):
            far = segments.roll(distance, axis)
            both = (far > 0) & (segments > 0)
            both.narrow(axis, 0, min(distance, both.shape[axis])).zero_()
            targets.append((far != segments).float())
            known.append(both.float())
        return torch.from_numpy(voxels)[None], torch.stack(targets), torch.stack(known)

    def _order(self) -> list[int]:
        """Axes of the volume in another order, where a crop is as long along all that may be turned."""
        fixed = [0] if self.flat else []
        turned = range(len(fixed), 3)
        if len({self.size[axis] for axis in turned}) > 1:
            return [0, 1, 2]
        return [*fixed, *(len(fixed) + self.random.permutation(len(turned)))]

    def _changed(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        random = self.random
        if random.random() < BLURRED:
            wide = random.uniform(0.0, LARGEST_BLUR)
            voxels = ndimage.gaussian_filter(voxels, (0.0 if self.flat else wide, wide, wide), truncate=3.0)
        if random.random() < NOISY:
            noise = random.standard_normal(voxels.shape, np.float32)
            voxels = voxels + np.float32(random.uniform(0.0, LARGEST_NOISE)) * noise
        contrast, brightness = random.uniform(-CONTRAST, CONTRAST), random.uniform(-BRIGHTNESS, BRIGHTNESS)
        return np.asarray(voxels * np.float32(1.0 + contrast) + np.float32(brightness), np.float32)


def _taught(network: MembraneNetwork, crops: _Crops, steps: int) -> MembraneNetwork:
    """The mean of a network's numbers over the steps of its training."""
    parameters = list(network.parameters())
    kept = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=1e-4)
    for step in range(steps):
        warmed = min(1.0, (step + 1) / WARMING)
        share = 0.5 * (1.0 + math.cos(math.pi * step / steps)) * (1.0 - LAST) + LAST
        for group in optimiser.param_groups:
            group["lr"] = RATE * warmed * share
        x, targets, known = (torch.stack(parts) for parts in zip(*_step(crops), strict=True))
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
    return kept.eval()


def _step(crops: _Crops) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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
    """Voxels (batch, 1, z, y, x) that go on beyond their ends to a multiple of THIN."""
    missing = [n for size in reversed(x.shape[2:]) for n in (0, -size % THIN)]
    padded = functional.pad(x, missing, mode="replicate")
    return padded.contiguous(memory_format=torch.channels_last_3d)


def _fewer_bits() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_in_bfloat16())

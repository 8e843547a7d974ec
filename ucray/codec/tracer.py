"""Tracer: a network that finds membranes, and which errors of voxels change what it finds.

::

    voxels --> cells of 2^3 --> blocks ------------------------(+)--> blocks --> membrane, or not
                                   +--> half as fine --> blocks --^

After Ronneberger et al. 2015 ("U-Net"). `ucray tracer` teaches one with labels; an encoder asks it what
errors weigh (`ucray.codec.sensitivity`), a decoder does not know of it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.postfilter import fast_in_bfloat16, learns_in_bfloat16
from ucray.errors import WeightsError
from ucray.grid import Box, Shape3, blocks, triple

FORMAT = "ucray-tracer-1"

WIDTHS = (32, 64, 96)
"""Channels on cells, on cells twice as large, and on those four times as large."""

STRIDE = 8
"""Voxels along an axis that a coarsest cell has, where sections are thin."""

GROUPS = 8
"""Of channels that are normalised together."""

TILE: Shape3 = (80, 80, 80)
"""Voxels of which gradients are found together, which takes 350 MiB; a multiple of STRIDE."""

FLAT_TILE: Shape3 = (24, 80, 80)
"""The same where sections are looked at one by one: their cells are as many as there are sections."""

SEEN = 8
"""Voxels around these, and a multiple of STRIDE too: what lies further off hardly says more of them."""

LARGEST_VOXEL = 1e4
"""In deviations; what is larger says no more."""

MIRRORED = tuple(
    tuple(2 + axis for axis in range(3) if back[axis]) for back in itertools.product((False, True), repeat=3)
)
"""Axes of voxels (batch, 1, z, y, x) that are turned back in each of a volume's mirror images, none first."""


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
        self.flat = flat
        kernel: Shape3 = (1, 3, 3) if flat else (3, 3, 3)
        half: Shape3 = (1, 2, 2) if flat else (2, 2, 2)
        self.halved = half
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

    @classmethod
    def holding(cls, tensors: Mapping[str, Tensor], *, flat: bool) -> MembraneNetwork:
        """A network of these tensors, which has learnt."""
        with torch.device("meta"):
            network = cls(flat=flat)
        network.load_state_dict(tensors, assign=True)
        return network.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Features (batch, width, ...) of cells."""
        fine = self.fine(self.first(functional.relu(self.stem(x))))
        middle = self.middle(self.to_middle(fine))
        middle = self.middle_again(middle + self.from_coarse(self.coarse(self.to_coarse(middle))))
        return torch.as_tensor(self.fine_again(fine + self.from_middle(middle)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.membrane(self.features(x)))


@dataclass(frozen=True)
class Normaliser:
    """Takes off a volume's mean and divides by its deviation."""

    offset: float
    scale: float

    @classmethod
    def of(cls, volume: npt.NDArray[np.generic]) -> Normaliser:
        """As suits a volume, of which some voxels may be no numbers."""
        whole = np.issubdtype(volume.dtype, np.integer)
        numbers = volume if whole else volume[np.isfinite(volume)]
        if not numbers.size:
            return cls(0.0, 1.0)
        return cls(float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64)) or 1.0)

    def normalised(self, volume: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """A volume, or another one in its units; what is no number is taken for the mean."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = (volume.astype(np.float32) - np.float32(self.offset)) / np.float32(self.scale)
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        return np.asarray(np.clip(values, -LARGEST_VOXEL, LARGEST_VOXEL), np.float32)


@dataclass(frozen=True)
class TracerNetwork:
    """A network that has learnt, and the units of the voxels that it learnt from."""

    network: MembraneNetwork
    normaliser: Normaliser

    def gradients(
        self, voxels: npt.NDArray[np.generic], box: Box, *, draws: int, seed: int
    ) -> npt.NDArray[np.float32]:
        """What `sign_gradients` says of a box of voxels (z, y, x), which is seen with what lies around it."""
        around = box.grown(SEEN).clipped(triple(iter(voxels.shape)))
        seen = self.normaliser.normalised(voxels[around.slices])
        return sign_gradients(self.network, seen, box.relative_to(around), draws=draws, seed=seed)

    def input_of(self, voxels: npt.NDArray[np.generic]) -> Tensor:
        """Voxels (z, y, x) as the network takes them, (1, 1, z, y, x)."""
        seen = torch.from_numpy(np.ascontiguousarray(self.normaliser.normalised(voxels)))[None, None]
        return seen.to(next(self.network.parameters()).device)

    def to(self, device: str) -> TracerNetwork:
        """The same on a device."""
        return TracerNetwork(self.network.to(device), self.normaliser)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        tensors = {name: tensor.cpu().numpy() for name, tensor in self.network.state_dict().items()}
        header = {"flat": self.network.flat, "offset": self.normaliser.offset, "scale": self.normaliser.scale}
        return bytes(save(tensors, metadata={FORMAT: json.dumps(header)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> TracerNetwork:
        """Parse a safetensors file.

        Raises
        ------
        WeightsError
            If it is damaged, or no tracer.
        """
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            header = json.loads((json.loads(data[8 : 8 + length]).get("__metadata__") or {})[FORMAT])
            flat, offset, scale = bool(header["flat"]), float(header["offset"]), float(header["scale"])
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise WeightsError(f"no tracer, or a damaged one: not a safetensors file of {FORMAT}") from None
        if not (math.isfinite(offset) and math.isfinite(scale) and scale > 0.0):
            raise WeightsError("the tracer is damaged: its units are no positive numbers")
        with torch.device("meta"):
            network = MembraneNetwork(flat=flat)
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype == np.float32}
        if found != expected or len(tensors) != len(expected):
            raise WeightsError("the tracer is damaged: its tensors are missing or misshapen")
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise WeightsError("the tracer is damaged: it holds what is no number")
        held = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        return cls(MembraneNetwork.holding(held, flat=flat), Normaliser(offset, scale))


def sign_gradients(
    network: MembraneNetwork, voxels: npt.NDArray[np.float32], box: Box, *, draws: int, seed: int
) -> npt.NDArray[np.float32]:
    """Gradients (draws, z, y, x), in a box of normalised voxels, of all probabilities with random signs.

    Each is divided by its deviation, the root of p (1 - p): mean squares along an error are Fisher
    information.
    """
    shape = triple(iter(voxels.shape))
    device = next(network.parameters()).device
    found = np.empty((draws, *box.shape), np.float32)
    signs = torch.Generator().manual_seed(seed)
    for tile, around in tiles(network, box, shape):
        inside = tile.relative_to(around).slices
        seen = np.ascontiguousarray(voxels[around.slices])
        x = torch.from_numpy(seen)[None, None].to(device).requires_grad_()
        logits = logits_of(network, x)
        probability = logits.detach().sigmoid()
        deviation = (probability * (1.0 - probability)).sqrt()
        for draw in range(draws):
            sign = torch.randint(0, 2, logits.shape, generator=signs) * 2 - 1
            total = (logits * deviation * sign.to(device)).sum()
            (gradient,) = torch.autograd.grad(total, x, retain_graph=draw + 1 < draws)
            found[(draw, *tile.relative_to(box).slices)] = gradient[0, 0].cpu().numpy()[inside]
    return found


def tiles(network: MembraneNetwork, box: Box, shape: Shape3) -> Iterator[tuple[Box, Box]]:
    """Tiles of a box of a volume, and each with what a network sees around it."""
    for part in blocks(box.shape, FLAT_TILE if network.flat else TILE):
        tile = part.shifted(box.start)
        yield tile, tile.grown(SEEN).clipped(shape)


def logits_of(network: MembraneNetwork, x: Tensor) -> Tensor:
    """What a network says of voxels (1, 1, z, y, x) of any shape, in as many."""
    with fewer_bits(x.device.type):
        logits = network(padded(x)).float()
    return torch.as_tensor(logits[(..., *(slice(n) for n in x.shape[2:]))])


def said_by(network: MembraneNetwork, x: Tensor) -> Tensor:
    """Probability of membranes in voxels (1, 1, z, y, x) of any shape: the mean over their mirror images."""
    whole = padded(x)
    total = torch.zeros_like(whole)
    with torch.inference_mode(), fewer_bits(x.device.type):
        for axes in MIRRORED:
            total += network(mirrored(whole, axes)).float().sigmoid().flip(axes)
    return torch.as_tensor(total[tuple(slice(n) for n in x.shape)] / len(MIRRORED))


def mirrored(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A mirror image of voxels, laid out as networks take them."""
    return x.flip(axes).contiguous(memory_format=torch.channels_last_3d)


def padded(x: Tensor) -> Tensor:
    """Voxels (batch, 1, z, y, x) that go on beyond their ends to a multiple of STRIDE."""
    missing = [n for size in reversed(x.shape[2:]) for n in (0, -size % STRIDE)]
    whole = functional.pad(x, missing, mode="replicate")
    return whole.contiguous(memory_format=torch.channels_last_3d)


def fewer_bits(device: str, *, two_deep: bool = False) -> torch.autocast:
    """Networks in bfloat16 where there are units made for it, and if on grids `two_deep`, that are right."""
    fast = learns_in_bfloat16() if two_deep else fast_in_bfloat16()
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or fast)

"""Membranes found by a U-Net that learns in some minutes of two cores.

Beside membranes it learns whether voxels some way apart belong to one neuron, which makes it look further
(Ronneberger et al. 2015, "U-Net"; Lee et al. 2017, "Superhuman accuracy on the SNEMI3D connectomics
challenge"). It is taught with crops turned, blurred, noisy and of other contrast: what a microscope or a
codec does to tissue, but no codec itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.bench.crops import Crops, offsets
from ucray.bench.tissue import Features, Finder, Lesson, Probability, Volume
from ucray.codec.allocator import keep_freed_memory
from ucray.codec.tracer import (
    WIDTHS,
    MembraneNetwork,
    Normaliser,
    TracerNetwork,
    fewer_bits,
    padded,
    said_by,
)
from ucray.errors import WeightsError

APART_WEIGHT = 0.1
"""Of each pair of voxels apart in the loss, where membranes have 1."""

CROPS = 2
"""Of a step."""

RATE, WARMING, LAST = 2e-3, 100, 0.01
"""Largest learning rate, steps until it is reached, and the last one's share."""

KEPT = 0.998
"""Of the mean of all steps' numbers at each step."""

RECIPE = 1
"""Of how networks learn, to be counted up with it: those kept of another are of no use."""

CELLS = (2, 4, 8)
"""Voxels along an axis of the network's cells, where sections are thin."""

Watch = Callable[[int], None]


class Shelf(Protocol):
    """Where networks that have learnt are kept, by name."""

    def get(self, key: str, /) -> bytes | None:
        """What is kept; None if there is nothing."""
        ...

    def put_new(self, key: str, data: bytes, /) -> bool:
        """Keep something, unless there is something of that name: False then."""
        ...


class TaughtNetwork(MembraneNetwork):
    """The same, and beside membranes whether voxels some way apart belong to two neurons."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__(flat=flat)
        self.apart = nn.ConvTranspose3d(WIDTHS[0], len(offsets(flat)), self.halved, self.halved)

    def both(self, x: Tensor) -> Tensor:
        """Logits (batch, 1 + offsets, z, y, x) of membranes, and of neurons that differ across offsets."""
        features = self.features(x)
        return torch.cat([self.membrane(features), self.apart(features)], dim=1)

    def membranes_alone(self) -> MembraneNetwork:
        """What says where membranes are."""
        apart = dict(self.apart.named_parameters(prefix="apart"))
        held = {name: tensor for name, tensor in self.state_dict().items() if name not in apart}
        return MembraneNetwork.holding(held, flat=self.flat)


@dataclass(frozen=True)
class NetworkSight:
    """How voxels are looked at: normalised, if `flat` section by section; networks learn in `steps`.

    A network that lies on the `shelf` does not learn again what it has learnt.
    """

    normaliser: Normaliser
    flat: bool
    steps: int
    shelf: Shelf | None = None

    @classmethod
    def of(cls, volume: Volume, *, flat: bool, steps: int, shelf: Shelf | None = None) -> NetworkSight:
        """As suits a volume."""
        return cls(Normaliser.of(volume), flat, steps, shelf)

    def features(self, volume: Volume) -> Features:
        """Normalised voxels (z, y, x, 1)."""
        return self.normaliser.normalised(volume)[..., None]

    def learnt(self, lesson: Lesson, *, seed: int) -> tuple[Finder, Probability]:
        """A network, and what it says of the voxels that it learnt from.

        It may be surer of these than of others; one that has not seen them would take as long again.
        """
        find = self.taught(lesson, seed=seed)
        return find, find(lesson.features)

    def taught(self, lesson: Lesson, *, seed: int, watch: Watch = lambda step: None) -> NetworkFinder:
        """A network that has learnt; `watch` is told after each step.

        Raises WeightsError if what is kept of it is damaged.
        """
        if self.shelf is None:
            return NetworkFinder(self._learning(lesson, seed, watch))
        name = f"network-{self._digest(lesson, seed)}.safetensors"
        data = self.shelf.get(name)
        if data is None:
            network = self._learning(lesson, seed, watch)
            self.shelf.put_new(name, TracerNetwork(network, self.normaliser).to_bytes())
            return NetworkFinder(network)
        return NetworkFinder(TracerNetwork.from_bytes(data).network)

    def _learning(self, lesson: Lesson, seed: int, watch: Watch) -> MembraneNetwork:
        keep_freed_memory()
        random = np.random.default_rng(seed)
        shown = lesson.features[..., 0], lesson.membrane, lesson.known, _neurons(lesson)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TaughtNetwork(flat=self.flat)
        return _taught(network, Crops(*shown, self.flat, random), self.steps, watch)

    def _digest(self, lesson: Lesson, seed: int) -> str:
        """Of all that a network's numbers come from."""
        shape = lesson.membrane.shape
        found = hashlib.sha256(json.dumps([RECIPE, self.flat, self.steps, seed, shape]).encode())
        for part in (lesson.features, lesson.membrane, lesson.known, _neurons(lesson)):
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()[:32]


@dataclass(frozen=True)
class NetworkFinder:
    """Says how probably a voxel is membrane."""

    network: MembraneNetwork

    def __call__(self, features: Features) -> Probability:
        return _found(self.network, features[..., 0])


def _neurons(lesson: Lesson) -> npt.NDArray[np.int32]:
    if lesson.segments is None:
        return np.zeros(lesson.membrane.shape, np.int32)
    return lesson.segments.astype(np.int32)


def _taught(network: TaughtNetwork, crops: Crops, steps: int, watch: Watch) -> MembraneNetwork:
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
        shown = padded(x)
        with fewer_bits("cpu", two_deep=_two_deep(shown, network)):
            logits = network.both(shown)
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
        watch(step + 1)
    if not all(tensor.isfinite().all() for tensor in kept.parameters()):
        raise WeightsError("what a network learnt is no number: its training diverged")
    return kept.membranes_alone()


def _two_deep(x: Tensor, network: MembraneNetwork) -> bool:
    """Whether kernels three sections deep meet a grid of two: see `learns_in_bfloat16`."""
    return not network.flat and any(x.shape[2] == 2 * size for size in CELLS)


def _step(crops: Crops) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return (crops.drawn() for _ in range(CROPS))


def _found(network: MembraneNetwork, voxels: npt.NDArray[np.float32]) -> Probability:
    """Probability of membranes in a volume."""
    x = torch.from_numpy(np.ascontiguousarray(voxels))[None, None]
    return np.asarray(said_by(network, x)[0, 0].numpy())

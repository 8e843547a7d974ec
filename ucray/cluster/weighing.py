"""What errors of a job's chunks weigh against each other: by a map, or by what a tracer sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ucray.cluster.plan import CompressPlan
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.importance import LEADING, ChunkImportance, Weights
from ucray.codec.tracer import SEEN, TracerNetwork
from ucray.errors import SettingsError
from ucray.grid import Box, triple
from ucray.storage.importance import ImportanceMap


@dataclass(frozen=True)
class Weighing:
    """Weights of chunks of a planned job's region, from its map or its tracer."""

    plan: CompressPlan
    encoder: ChunkEncoder
    way: ImportanceMap | TracerNetwork

    @classmethod
    def of(cls, plan: CompressPlan, encoder: ChunkEncoder) -> Weighing | None:
        """As a job is planned; None where all errors weigh the same."""
        if plan.tracer is not None:
            network = TracerNetwork.from_bytes(plan.tracer.read()).to(str(encoder.device))
            return cls(plan, encoder, network)
        return None if plan.importance is None else cls(plan, encoder, plan.importance)

    def weights(self, box: Box) -> Weights:
        """Weights of a chunk in `box` of the region: of its cells (z, y, x), or (z, y, x, latents)."""
        if isinstance(self.way, ImportanceMap):
            return self.way.cells(self.plan.source_box(box))
        grid = self.plan.grid
        # A worker holds one shard, and sees no voxels beyond it.
        index = triple(start // size for start, size in zip(box.start, grid.shard, strict=True))
        around = box.grown(SEEN).common(grid.shard_box(index))
        voxels = self.plan.volume.read(self.plan.source_box(around))
        return self.encoder.sensitivity.seen_by(self.way, voxels, box.relative_to(around))

    def mean(self, weights: Sequence[Weights]) -> float:
        """The mean weight of chunks; raises SettingsError if that is zero."""
        leading = [one if one.ndim == 3 else one[..., :LEADING] for one in weights]
        mean = float(f"{np.concatenate([one.reshape(-1) for one in leading]).mean():.6g}")
        if mean == 0.0:
            plan = self.plan
            asked = "" if plan.importance is None else f"--importance {plan.importance.weights.url}"
            asked = asked if plan.tracer is None else f"--traced-by {plan.tracer.url}"
            raise SettingsError(f"{asked} is zero wherever it was looked at")
        return mean

    def importance(self, weights: Weights, mean: float) -> ChunkImportance:
        """What a chunk of these weights changes where the volume's mean is `mean`."""
        if isinstance(self.way, ImportanceMap):
            return ChunkImportance.of(weights, mean, self.plan.grid.chunk, self.way.cell)
        return ChunkImportance.of_latents(weights, mean)

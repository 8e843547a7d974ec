"""What errors of a job's chunks weigh against each other: by a map, or by what a tracer sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ucray.cluster.plan import CompressPlan
from ucray.codec.encoder import ChunkEncoder, Prepared
from ucray.codec.importance import LEADING, ChunkImportance, Weights
from ucray.codec.steering import Steering, View
from ucray.codec.tracer import SEEN, TracerNetwork
from ucray.errors import SettingsError
from ucray.grid import Box, triple
from ucray.storage.importance import ImportanceMap

Look = Weights | View
"""What weighs the errors of a chunk: a map's cells (z, y, x), or what a tracer sees."""


def seen_around(plan: CompressPlan, box: Box) -> Box:
    """What a tracer sees of a chunk in `box` of the region: a worker holds one shard, and nothing beyond."""
    grid = plan.grid
    index = triple(start // size for start, size in zip(box.start, grid.shard, strict=True))
    return box.grown(SEEN).common(grid.shard_box(index))


@dataclass(frozen=True)
class Weighing:
    """Weighs chunks of a planned job's region by its map, or weighs and steers them by its tracer."""

    plan: CompressPlan
    way: ImportanceMap | Steering

    @classmethod
    def of(cls, plan: CompressPlan, encoder: ChunkEncoder) -> Weighing | None:
        """As a job is planned; None where all errors weigh the same."""
        if plan.tracer is not None:
            return cls(plan, Steering(encoder, TracerNetwork.from_bytes(plan.tracer.read())))
        return None if plan.importance is None else cls(plan, plan.importance)

    def near(self, box: Box) -> npt.NDArray[np.generic]:
        """What must be read to look at a chunk in `box` of the region: a map's cells, or voxels around it."""
        if isinstance(self.way, ImportanceMap):
            return self.way.cells(self.plan.source_box(box))
        return self.plan.volume.read(self.plan.source_box(seen_around(self.plan, box)))

    def look(self, prepared: Prepared, box: Box, near: npt.NDArray[np.generic]) -> Look | None:
        """At a chunk in `box` of the region; a tracer does not look where there is nothing but fill."""
        if not isinstance(self.way, Steering):
            return near.astype(np.float32, copy=False)
        if not prepared.neural:
            return None
        return self.way.view(near, box.relative_to(seen_around(self.plan, box)))

    def mean(self, looks: Sequence[Look | None]) -> float:
        """The mean weight of chunks that were looked at; raises SettingsError if that is zero."""
        seen = [look for look in looks if look is not None]
        if not seen:
            return 1.0
        weights = [look.weights[..., :LEADING] if isinstance(look, View) else look for look in seen]
        mean = float(f"{np.concatenate([one.reshape(-1) for one in weights]).mean():.6g}")
        if mean == 0.0:
            option = "--importance" if self.plan.tracer is None else "--traced-by"
            raise SettingsError(f"{option} {self.plan.weighed_by} is zero wherever it was looked at")
        return mean

    def weighed(self, prepared: Prepared, look: Look | None, mean: float) -> Prepared:
        """A prepared chunk with its importance where the volume's mean weight is `mean`."""
        if look is None:
            return prepared
        if isinstance(look, View):
            return replace(prepared, importance=ChunkImportance.of_latents(look.weights, mean))
        assert isinstance(self.way, ImportanceMap)
        found = ChunkImportance.of(look, mean, self.plan.grid.chunk, self.way.cell)
        return replace(prepared, importance=found)

    def steered(self, prepared: Prepared, look: Look | None, quality: int, mean: float) -> Prepared:
        """A weighed chunk as a worker codes it at the volume's quality: steered, if a tracer looks at it."""
        if isinstance(look, View):
            assert isinstance(self.way, Steering)
            return self.way.steered(prepared, look, quality, mean)
        return prepared

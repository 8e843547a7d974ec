"""An interlaced first group: its chunks come back, weights say so, and older ones learn the order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace as with_fields

import numpy as np
import pytest
import torch
from conftest import TINY_INTERLACED, SmoothVolume
from msgspec.structs import replace

from ucray.codec.chunk import ChunkFormat
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.network import stored_synthesis
from ucray.codec.passes import CHECKERBOARD, INTERLACED
from ucray.codec.weights import Weights
from ucray.config import CodecConfig
from ucray.errors import SettingsError, WeightsError
from ucray.settings import TrainingConfig
from ucray.training import distill, ordering
from ucray.training.calibrate import load_coder
from ucray.training.distill import Trainer
from ucray.training.loss import Coder, frozen_stream

NOTHING = TrainingConfig(teacher_steps=0, student_steps=1, learning_rate=1e-9)


@pytest.fixture(scope="module")
def tiles(smooth_volume: SmoothVolume) -> torch.Tensor:
    """Chunks (batch, 1, z, y, x) of 64^3, alike over several cells of 8^3."""
    coarse = np.stack([smooth_volume((16, 16, 16), n) for n in range(8)])[:, None]
    return torch.from_numpy(coarse).repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 32, 32), (16, 48, 80)])
def test_chunks_of_any_grid_come_back(
    shape: tuple[int, int, int],
    interlaced_weights: Weights,
    chunk_format: Callable[[str], ChunkFormat],
    smooth_volume: SmoothVolume,
) -> None:
    """Grids so small too that some passes have no cells."""
    chunk = with_fields(chunk_format("float32"), shape=shape)
    voxels = (smooth_volume(shape, 5) * chunk.scale + chunk.offset).astype(np.float32)
    packed = ChunkEncoder(interlaced_weights, chunk).encode(voxels, 200)
    decoded = ChunkDecoder(interlaced_weights.decoder(), chunk).decode(packed.data)
    error = np.mean(np.square(decoded.astype(np.float64) - voxels))
    assert error == pytest.approx(packed.error.mse, rel=1e-3)
    assert error < 0.25 * np.var(voxels)


@pytest.mark.parametrize("interlaced", [False, True])
def test_networks_of_another_order_are_refused(
    interlaced: bool, dependent_weights: Weights, interlaced_weights: Weights
) -> None:
    weights = dependent_weights if interlaced else interlaced_weights
    changed = Weights(replace(weights.config, interlaced=interlaced), weights.tensors)
    with pytest.raises(WeightsError, match="damaged"):
        changed.check_stream()


@pytest.mark.parametrize("given", [{"interlaced": 1}, {"interlaced": True, "checkered": 0}])
def test_an_order_that_there_is_none_of_is_refused(given: dict[str, object]) -> None:
    plain = TINY_INTERLACED.to_json() | given
    with pytest.raises(ValueError, match="interlaced"):
        CodecConfig.parse(json.loads(json.dumps(plain)))


def test_weights_of_an_older_order_learn_the_new_one(
    dependent_weights: Weights, tiles: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they had stays; a cell that has others around it takes fewer bits than one that has none."""
    monkeypatch.setattr(ordering, "STEPS", 150)
    monkeypatch.setattr(ordering, "LARGE_BATCH", 8)
    monkeypatch.setattr(distill, "ORDER_CHUNKS", 32)
    trainer = Trainer(TINY_INTERLACED, NOTHING, start=dependent_weights)
    with pytest.raises(SettingsError, match="start"):
        trainer.step(tiles)
    trainer.start(lambda count: tiles[:count])
    trainer.step(tiles)
    kept = len(CHECKERBOARD) - 1
    before = dependent_weights.stream.context
    after = trainer.coder.prior.to_integers(trainer.coder.codebook.entries)
    for old, new in zip(before.networks[kept:], after.networks[len(INTERLACED) - kept :], strict=True):
        for one, other in zip(old, new, strict=True):
            np.testing.assert_array_equal(one.weight, other.weight)
    np.testing.assert_array_equal(before.step, after.step)
    made = trainer.finish([tiles[:2]], {})
    assert made.config.interlaced

    def bits_a_cell(weights: Weights, chosen: slice) -> float:
        coder, decoder = Coder(weights.config), stored_synthesis(weights, "student")
        load_coder(weights, coder)
        passes, networks = coder.prior.passes, coder.prior.networks
        bits = [0.0]
        quality = torch.full((len(tiles),), 160.0)
        for count in range(1, len(INTERLACED)):
            coder.prior.passes, coder.prior.networks = passes[:count], networks[:count]
            with torch.no_grad():
                bits.append(float(frozen_stream(coder, decoder, tiles, quality).bits.sum()))
        cells = sum(int(part.colour.cells((8, 8, 8)).sum()) for part in passes[chosen])
        return float(bits[chosen.stop] - bits[chosen.start]) / cells

    assert bits_a_cell(made, slice(1, 5)) < 0.9 * bits_a_cell(made, slice(0, 1))
    resumed = Trainer(TINY_INTERLACED, NOTHING, start=dependent_weights)
    resumed.from_bytes(trainer.to_bytes())
    assert resumed.finish([tiles[:2]], {}).stream_digest == made.stream_digest
    # They have all they need now.
    again = Trainer(made.config, NOTHING, start=made)
    again.step(tiles)


def test_a_stream_that_is_kept_keeps_its_order(dependent_weights: Weights) -> None:
    settings = NOTHING.model_copy(update={"keep_stream": True})
    with pytest.raises(SettingsError, match="another configuration"):
        Trainer(TINY_INTERLACED, settings, start=dependent_weights)

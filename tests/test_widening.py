"""Latents that are added to weights: fine qualities gain, coarse ones stay as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_LONG_PATHS, SmoothVolume
from msgspec.structs import replace
from typer.testing import CliRunner

import ucray
from ucray.cli import app
from ucray.codec.bitstream import NeuralBody, read_chunk
from ucray.codec.chunk import ChunkFormat
from ucray.codec.conditioning import KNOTS
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder, Packed
from ucray.codec.weights import Weights
from ucray.config import QUALITIES, CodecConfig
from ucray.errors import SettingsError
from ucray.settings import TrainingConfig
from ucray.training import distill, ordering
from ucray.training.distill import Trainer

NOTHING = TrainingConfig(teacher_steps=0, student_steps=1, learning_rate=1e-9, keep_stream=True)
CHUNK = (32, 32, 32)
COARSE, FINE = 10, 255

LINEAR = replace(
    TINY_LONG_PATHS, analysis=None, teacher=None, student=None, code_stages=0, code_width=0, groups=(3, 5)
)
WIDER = replace(LINEAR, groups=(3, 5, 24))


@pytest.fixture(scope="module", autouse=True)
def short() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "STEPS", 100)
        patch.setattr(distill, "ORDER_CHUNKS", 32)
        yield


@pytest.fixture(scope="module")
def tiles(smooth_volume: SmoothVolume) -> torch.Tensor:
    """Smooth chunks (batch, 1, z, y, x) and noise."""
    smooth = np.stack([smooth_volume(CHUNK, seed) for seed in range(16)])
    noise = 0.1 * np.random.default_rng(1).standard_normal(smooth.shape)
    return torch.from_numpy((smooth + noise).astype(np.float32))[:, None].repeat(4, 1, 1, 1, 1)


def trained(config: CodecConfig, tiles: torch.Tensor, start: Weights | None) -> Weights:
    settings = NOTHING.model_copy(update={"keep_stream": start is not None})
    trainer = Trainer(config, settings, start=start)
    trainer.start(lambda count: tiles[:count])
    trainer.step(tiles[:4])
    return trainer.finish([tiles[:8], tiles[8:16]], {})


@pytest.fixture(scope="module")
def narrow(tiles: torch.Tensor) -> Weights:
    """Its student doubles latents before it halves them: one that was trained scales them somehow."""
    made = trained(LINEAR, tiles, None)
    halved = made.tensors["student.linear.weight:scale"].astype(np.float32) / 2
    changed = {
        "student.linear.weight:scale": halved,
        "student.rescaled.scale": np.ones_like(made.tensors["student.rescaled.scale"]),
    }
    return Weights(made.config, {**made.tensors, **changed}, {})


@pytest.fixture(scope="module")
def wide(tiles: torch.Tensor, narrow: Weights) -> Weights:
    return trained(WIDER, tiles, narrow)


def coded(weights: Weights, quality: int, smooth_volume: SmoothVolume) -> tuple[Packed, float]:
    """A chunk that was not learnt from, and its error once it is decoded by what an archive holds."""
    chunk = ChunkFormat(CHUNK, "float32", 0.0, 0.0, 1.0)
    noise = 0.1 * np.random.default_rng(2).standard_normal(CHUNK)
    voxels = (smooth_volume(CHUNK, 99) + noise).astype(np.float32)
    packed = ChunkEncoder(weights, chunk).encode(voxels, quality)
    decoded = ChunkDecoder(weights.decoder(), chunk).decode(packed.data)
    return packed, float(np.square(decoded.astype(np.float64) - voxels).mean())


def test_fine_qualities_come_closer(narrow: Weights, wide: Weights, smooth_volume: SmoothVolume) -> None:
    _, before = coded(narrow, FINE, smooth_volume)
    packed, after = coded(wide, FINE, smooth_volume)
    # Eight latents of 512 voxels hold so little that 24 more hold at least as much again.
    assert after < 0.75 * before
    assert packed.error.mse == pytest.approx(after, rel=1e-3)


def test_coarse_qualities_stay_as_they_were(
    narrow: Weights, wide: Weights, smooth_volume: SmoothVolume
) -> None:
    """The new group is not coded there, in fewer passes than there were before."""
    passes = []
    for weights in (narrow, wide):
        packed, _ = coded(weights, COARSE, smooth_volume)
        body = read_chunk(packed.data, bytes.fromhex(weights.stream_digest)).body
        assert isinstance(body, NeuralBody)
        passes.append(body.passes)
    assert passes[1] <= passes[0] <= len(narrow.stream.context.passes)
    body = read_chunk(coded(wide, FINE, smooth_volume)[0].data, bytes.fromhex(wide.stream_digest)).body
    assert isinstance(body, NeuralBody)
    assert body.passes == len(wide.stream.context.passes)


def test_what_was_there_is_kept(narrow: Weights, wide: Weights) -> None:
    known = LINEAR.latents
    before, after = narrow.stream.context, wide.stream.context
    # Up to the last knot but one; to the last one steps become finer by half an octave.
    steps = [context.step[:, :known] * context.unit[:known] for context in (before, after)]
    finer = np.log2(steps[0] / steps[1])
    knot = (KNOTS - 2) * (QUALITIES - 1) // (KNOTS - 1)
    assert np.abs(finer[: knot + 1]).max() < 0.02
    assert finer[-1] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(before.base, after.base[:known])
    for old, new in zip(before.networks, after.networks[: len(before.networks)], strict=True):
        for one, two in zip(old, new, strict=True):
            np.testing.assert_array_equal(one.weight, two.weight)
    assert len(after.networks) == len(before.networks) + 1
    stored = [weights.network("analysis")["linear.weight"] for weights in (narrow, wide)]
    np.testing.assert_array_equal(stored[0], stored[1][:known])


def test_they_can_be_trained_on(wide: Weights, tiles: torch.Tensor) -> None:
    settings = NOTHING.model_copy(update={"keep_stream": True})
    again = Trainer(WIDER, settings, start=wide)
    again.step(tiles[:2])
    assert again.finish([tiles[:2]], {}).stream_digest == wide.stream_digest


def test_a_run_that_was_lost_goes_on(narrow: Weights, tiles: torch.Tensor, wide: Weights) -> None:
    first = Trainer(WIDER, NOTHING, start=narrow)
    with pytest.raises(SettingsError, match="start"):
        first.step(tiles[:4])
    first.start(lambda count: tiles[:count])
    first.step(tiles[:4])
    resumed = Trainer(WIDER, NOTHING, start=narrow)
    resumed.from_bytes(first.to_bytes())
    assert resumed.finish([tiles[:8], tiles[8:16]], {}).digest == wide.digest


@pytest.mark.parametrize("groups", [(3,), (3, 6), (4, 5, 24)])
def test_other_latents_than_there_are_are_refused(narrow: Weights, groups: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="another configuration"):
        Trainer(replace(LINEAR, groups=groups), NOTHING, start=narrow)


@pytest.mark.parametrize(("init", "told"), [([], "give --init"), (["--init", "W"], "linear alone")])
def test_latents_that_cannot_be_added_are_refused_before_anything_is_read(
    init: list[str], told: str, tmp_path: Path, long_path_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("W").write_bytes(long_path_weights.to_bytes())
    ucray.synth("em.zarr", (32, 32, 32))
    found = CliRunner().invoke(app, ["train", "em.zarr", "out", "--more-latents", "8", *init])
    assert isinstance(found.exception, SettingsError)
    assert told in str(found.exception)
    assert not Path("out").exists()


def test_weights_with_networks_are_refused(long_path_weights: Weights) -> None:
    wider = replace(TINY_LONG_PATHS, groups=(*TINY_LONG_PATHS.groups, 8))
    with pytest.raises(SettingsError, match="linear alone"):
        Trainer(wider, NOTHING, start=long_path_weights)


def test_a_bound_holds_with_them(wide: Weights, smooth_volume: SmoothVolume) -> None:
    chunk = ChunkFormat(CHUNK, "uint8", 0.0, 128.0, 30.0)
    voxels = np.clip(smooth_volume(CHUNK, 98) * 30 + 128, 1, 255).astype(np.uint8)
    packed = ChunkEncoder(wide, chunk, max_error=2.0).encode(voxels, FINE)
    decoded = ChunkDecoder(wide.decoder(bounded=True), chunk).decode(packed.data)
    assert np.abs(decoded.astype(int) - voxels).max() <= 2

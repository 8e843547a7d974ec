"""What a post-filter will add is taken off before latents are rounded; where none reads them, nothing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_fields

import numpy as np
import pytest
import torch
from conftest import smooth_volume_of
from torch import Tensor

from ucray.codec import anticipation
from ucray.codec.anticipation import DEAD_ZONE, SHARE, anticipated
from ucray.codec.chunk import ChunkFormat
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.linear import LinearAnalysis, LinearSynthesis, start_linear
from ucray.codec.postfilter import PostFilter
from ucray.codec.shipped import shipped_for, shipped_weights
from ucray.codec.weights import Weights
from ucray.config import CodecConfig, FilterConfig
from ucray.synthetic import synthetic_volume

FINEST = 160
STEP = 0.25


class Louder(PostFilter):
    """Makes everything a tenth louder."""

    def change(self, x: Tensor, quality: Tensor) -> Tensor:
        return 0.1 * x


@pytest.fixture
def transforms() -> tuple[LinearAnalysis, LinearSynthesis, Tensor]:
    """An orthonormal transform, the decoder behind it, and latents of two chunks."""
    config = CodecConfig(
        groups=(512,), teacher=None, student=None, analysis=None, code_stages=0, code_width=0
    )
    analysis = LinearAnalysis(config)
    synthesis = LinearSynthesis(config)
    synthesis.postfilter = Louder(config, FilterConfig(4, 1, FINEST))
    x = torch.from_numpy(np.stack([smooth_volume_of((32, 32, 32), seed) for seed in (1, 2)]))[:, None]
    with torch.no_grad():
        start_linear(analysis, synthesis, x)
        return analysis.eval(), synthesis.eval(), analysis.latents(x)


def test_a_share_of_what_the_filter_adds_to_a_rough_code_is_taken_off(
    transforms: tuple[LinearAnalysis, LinearSynthesis, Tensor],
) -> None:
    analysis, synthesis, y = transforms
    quality = torch.tensor([float(FINEST), FINEST + 1.0])
    step = torch.full((2, y.shape[1]), STEP)
    with torch.no_grad():
        found = anticipated(y, y.new_zeros(2, 0, 2, 2, 2), quality, step, analysis, synthesis)
    size = y.abs() / STEP
    rough = y.sign() * STEP * ((size + 1.0 - DEAD_ZONE).floor())
    assert (rough == 0).any()
    assert (rough != 0).any()
    torch.testing.assert_close(found[0], (y - SHARE * 0.1 * rough)[0], rtol=0, atol=1e-4)
    # The second chunk is not filtered.
    assert torch.equal(found[1], y[1])


def test_latents_that_no_filter_reads_are_left_alone(
    transforms: tuple[LinearAnalysis, LinearSynthesis, Tensor],
) -> None:
    analysis, synthesis, y = transforms
    synthesis.postfilter = None
    step = torch.full((2, y.shape[1]), STEP)
    assert anticipated(y, y.new_zeros(2, 0, 2, 2, 2), torch.zeros(2), step, analysis, synthesis) is y


def test_bounded_chunks_are_not_filtered_and_anticipate_nothing(
    filtered_weights: Weights,
    chunk_format: Callable[[str], ChunkFormat],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunk = with_fields(chunk_format("uint8"), shape=(32, 32, 32))
    voxels = synthetic_volume(chunk.shape, seed=3)
    encoder = ChunkEncoder(filtered_weights, chunk, max_error=4)
    before = encoder.encode(voxels, 100).data
    monkeypatch.setattr(anticipation, "SHARE", 0.0)
    assert encoder.encode(voxels, 100).data == before


def test_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared error + lambda * bits of a chunk of tissue, with the weights that ship."""
    name = shipped_for(CodecConfig())
    assert name is not None
    voxels = synthetic_volume((64, 64, 64), seed=3)
    chunk = ChunkFormat((64, 64, 64), "uint8", 0.0, float(voxels.mean()), float(voxels.std()))
    encoder = ChunkEncoder(shipped_weights(name), chunk)

    def coded(quality: int) -> tuple[float, float]:
        packed = encoder.encode(voxels, quality)
        return packed.error.squared, 8.0 * len(packed.data)

    quality = 110
    error, bits = coded(quality)
    monkeypatch.setattr(anticipation, "SHARE", 0.0)
    (plain, plain_bits), (finer, finer_bits) = coded(quality), coded(quality + 4)
    slope = (plain - finer) / (finer_bits - plain_bits)
    assert error + slope * bits < plain + slope * plain_bits

"""What is linear may be computed in fewer bits, as long as rounding loses far more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import smooth_volume_of

from ucray.codec import linear
from ucray.codec.linear import FINEST_IN_FEWER_BITS, LinearAnalysis, LinearSynthesis, start_linear
from ucray.codec.prior import ContextPrior
from ucray.config import CodecConfig, FilterConfig

FINER = 0.02
"""Of a rounding's squared error, what fewer bits may add to it: a tenth of a dB would be 0.023."""


@pytest.fixture
def analysis() -> LinearAnalysis:
    """An orthonormal transform of smooth chunks."""
    config = CodecConfig(
        groups=(128,), teacher=None, student=None, analysis=None, code_stages=0, code_width=0
    )
    made = LinearAnalysis(config)
    with torch.no_grad():
        start_linear(
            made, LinearSynthesis(config), torch.from_numpy(smooth_volume_of((32, 32, 32), 2))[None, None]
        )
    return made.eval()


@pytest.mark.parametrize("quality", [0.0, FINEST_IN_FEWER_BITS])
def test_fewer_bits_say_what_rounding_leaves(
    analysis: LinearAnalysis, quality: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.from_numpy(smooth_volume_of((32, 32, 32), 1))[None, None]
    at = torch.tensor([quality])
    with torch.no_grad():
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.float32)
        exact, _ = analysis(x, at)
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.bfloat16)
        found, side = analysis(x, at)
        step = torch.exp2(-ContextPrior(CodecConfig()).gain_at(at)).amax()
    assert found.dtype == side.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert float((found - exact).square().mean()) < FINER * float(step) ** 2 / 12


def test_the_finest_qualities_keep_all_bits(
    analysis: LinearAnalysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.from_numpy(smooth_volume_of((32, 32, 32), 1))[None, None]
    with torch.no_grad():
        exact, _ = analysis(x, torch.tensor([FINEST_IN_FEWER_BITS + 1]))
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.bfloat16)
        assert torch.equal(analysis(x, torch.tensor([FINEST_IN_FEWER_BITS + 1]))[0], exact)


@pytest.fixture
def synthesis() -> LinearSynthesis:
    """One that scales and shifts latents by the quality, with a filter that adds nothing."""
    config = CodecConfig(
        groups=(128,), teacher=None, student=None, analysis=None, code_stages=0, code_width=0
    )
    torch.manual_seed(3)
    made = LinearSynthesis(config, FilterConfig(width=8, layers=2, finest=100))
    with torch.no_grad():
        made.rescaled.scale.normal_(std=0.2)
        made.rescaled.shift.normal_(std=0.05)
    return made.eval()


def test_one_chunk_is_decoded_as_among_others(synthesis: LinearSynthesis) -> None:
    """Alone, its latents are scaled within the product to voxels, and the last quality's matrix is kept."""
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 128, 4, 4, 4)).astype(np.float32))
    quality = torch.tensor([101.0, 150.0, 101.0])
    with torch.no_grad():
        together = synthesis(latents, latents[:, :0], quality)
        for n in (0, 1, 2, 0):
            alone = synthesis(latents[n : n + 1], latents[:1, :0], quality[n : n + 1])
            torch.testing.assert_close(alone, together[n : n + 1], rtol=0, atol=1e-5)
    assert (synthesis(latents, latents[:, :0], quality.flip(0) + 60.0) - together).abs().max() > 0.01


@pytest.mark.parametrize("quality", [20.0, 100.0])
def test_where_a_filter_follows_fewer_bits_say_what_rounding_leaves(
    synthesis: LinearSynthesis, quality: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 128, 4, 4, 4)).astype(np.float32))
    at = torch.tensor([quality])
    with torch.no_grad():
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.float32)
        exact = synthesis(latents, latents[:, :0], at)
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.bfloat16)
        found = synthesis(latents, latents[:, :0], at)
        step = torch.exp2(-ContextPrior(CodecConfig()).gain_at(at)).amax()
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert float((found - exact).square().mean()) < FINER * float(step) ** 2 / 12


def test_where_no_filter_follows_all_bits_are_kept(
    synthesis: LinearSynthesis, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 128, 4, 4, 4)).astype(np.float32))
    at = torch.tensor([101.0])
    with torch.no_grad():
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.float32)
        exact = synthesis(latents, latents[:, :0], at)
        monkeypatch.setattr(linear, "computed_in", lambda x: torch.bfloat16)
        assert torch.equal(synthesis(latents, latents[:, :0], at), exact)

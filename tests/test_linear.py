"""What is linear may be computed in fewer bits, as long as rounding loses far more."""

from __future__ import annotations

import pytest
import torch
from conftest import smooth_volume_of

from ucray.codec import linear
from ucray.codec.linear import FINEST_IN_FEWER_BITS, LinearAnalysis, LinearSynthesis, start_linear
from ucray.codec.prior import ContextPrior
from ucray.config import CodecConfig

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

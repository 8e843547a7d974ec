"""What adds nothing is left out after training; what is needed stays."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import smooth_volume_of
from torch import Tensor

from ucray.codec.network import Synthesis, stored_synthesis, synthesis_of
from ucray.codec.weights import Weights
from ucray.config import QUALITIES, CodecConfig
from ucray.training.calibrate import load_coder, to_weights
from ucray.training.loss import Coder, frozen_stream
from ucray.training.prune import Networks, prune, with_linear_analysis, without

CHUNK = (32, 32, 32)


@pytest.fixture
def batches() -> list[Tensor]:
    """Two batches of two smooth chunks."""
    return [
        torch.from_numpy(
            np.stack([smooth_volume_of(CHUNK, seed), smooth_volume_of(CHUNK, seed + 1)])[:, None]
        )
        for seed in (40, 50)
    ]


@pytest.fixture
def networks(tiny_config: CodecConfig, tiny_weights: Weights) -> Networks:
    """Networks of the tiny weights; their corrections, which are noise, are taken away."""
    coder = Coder(tiny_config)
    load_coder(tiny_weights, coder)
    teacher, student = stored_synthesis(tiny_weights, "teacher"), synthesis_of(tiny_config, "student")
    assert isinstance(student, Synthesis)
    student.lapped.load_state_dict(teacher.lapped.state_dict())
    student.linear.load_state_dict(teacher.linear.state_dict())
    with torch.no_grad():
        for layer in (coder.analysis.correct, student.correct, student.inr.value):
            for parameter in layer.parameters():  # type: ignore[union-attr]
                parameter.zero_()
    coder.requires_grad_(False)
    return Networks(tiny_config, coder, teacher, student)


def test_networks_that_add_nothing_are_left_out(networks: Networks, batches: list[Tensor]) -> None:
    made = prune(networks, batches)
    assert made.config.student is None
    assert made.config.analysis is None
    assert made.config.code_stages == made.config.code_width == 0
    assert not isinstance(made.student, Synthesis)
    weights = to_weights(made.config, made.coder, made.teacher, made.student, batches, {})
    read = Weights.from_bytes(weights.decoder().to_bytes())
    assert read.config == made.config
    assert read.stream.frequencies.code_models == []


def test_a_student_whose_networks_are_needed_keeps_them(networks: Networks, batches: list[Tensor]) -> None:
    """Its linear part is off by a constant, which its networks take back."""
    student = networks.student
    assert isinstance(student, Synthesis)
    with torch.no_grad():
        student.correct.bias.zero_()  # type: ignore[union-attr]
        student.correct.bias[0] = 4.0  # type: ignore[index]
        subbands = (student.correct.bias * student.subband_scale)[None, :, None, None, None]  # type: ignore[operator]
        offset = student.wavelet.inverse(subbands.expand(-1, -1, 2, 2, 2).contiguous()).flatten()
        # What each latent gives, column by column, and the latents that give nearest to the opposite.
        units = torch.eye(networks.config.latents)[:, :, None, None, None]
        cells = student.unlapped(units, torch.zeros(len(units))).flatten(1)
        student.rescaled.shift.add_(torch.linalg.lstsq(cells.T, -offset[:, None]).solution[:, 0])
    made = prune(networks, batches)
    assert made.config.student == networks.config.student
    assert made.config.analysis is None


def test_a_linear_student_decodes_as_one_whose_networks_say_nothing(
    networks: Networks, batches: list[Tensor]
) -> None:
    quality = torch.tensor([30.0, 200.0])
    stream = frozen_stream(networks.coder, networks.student, batches[0], quality)
    linear = without(networks, "student", "student").student
    with torch.no_grad():
        expected = networks.student(stream.y_hat, stream.prior, quality)
        torch.testing.assert_close(linear(stream.y_hat, stream.prior, quality), expected)


@pytest.mark.parametrize("student", [True, False])
def test_codes_that_are_always_the_same_become_biases(
    networks: Networks, batches: list[Tensor], student: bool
) -> None:
    """With the same latents and the codes written everywhere, both decoders and the context model agree."""
    found = networks if student else without(networks, "student", "student")
    codes = torch.tensor([3, 7])
    always = copy.deepcopy(found.coder)
    always.codebook.entries.fill_(1e6)
    vector = found.coder.codebook.lookup(codes[None])[0]
    always.codebook.entries[0, 0] = vector
    always.codebook.entries[1, 0] = 0.0
    made = with_linear_analysis(found, codes)
    quality = torch.linspace(0, QUALITIES - 1, 2)
    with torch.no_grad():
        for x in batches:
            before = frozen_stream(always, found.student, x, quality)
            after = frozen_stream(made.coder, made.student, x, quality)
            torch.testing.assert_close(
                before.prior, vector[None, :, None, None, None].expand(before.prior.shape)
            )
            torch.testing.assert_close(after.bits, before.bits, rtol=1e-3, atol=0)
            for old, new in ((found.teacher, made.teacher), (found.student, made.student)):
                torch.testing.assert_close(
                    new(before.y_hat, after.prior, quality),
                    old(before.y_hat, before.prior, quality),
                    rtol=0,
                    atol=1e-4,
                )

"""Latents for finer qualities than those that weights to start from have.

What the latents there are leave of a volume is nearly all noise, and has a Karhunen-Loeve transform like
anything else. Its first components are one group more, coded last: chunks of coarse qualities do without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ucray.codec.linear import LinearSynthesis, latent_cells, principal
from ucray.config import QUALITIES, CodecConfig
from ucray.errors import SettingsError
from ucray.training.loss import Coder

FINER = 0.5
"""Octaves by which all steps are smaller than they were at the finest quality; by less up to a knot below."""

SURROUNDED, RESPONSES = 5, 64
"""Cells along an axis in the middle of which a number is looked at, and how many numbers at once."""


def is_wider(config: CodecConfig, than: CodecConfig) -> bool:
    """Whether a configuration has all groups of another, and more behind them.

    Raises
    ------
    SettingsError
        If it has, and the other cannot be widened.
    """
    known = len(than.groups)
    if config.groups == than.groups or config.groups[:known] != than.groups:
        return False
    check_linear(than)
    return True


def check_linear(config: CodecConfig) -> None:
    """Raise SettingsError for weights with networks that read or make latents: they would start anew."""
    if any(networks is not None for networks in (config.analysis, config.teacher, config.student)):
        raise SettingsError("latents can be added to weights that are linear alone, and these have networks")


def take_first(target: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Write stored tensors to the beginning of those of the same names, which are as large or larger."""
    with torch.no_grad():
        for name, value in stored.items():
            target[name][tuple(slice(0, n) for n in value.shape)].copy_(value)


def start_rest(coder: Coder, decoders: Sequence[LinearSynthesis], known: int, x: Tensor) -> None:
    """Set latents from `known` on to the largest components of what those before them leave of chunks.

    What an analysis and a decoder that learnt for long make of a chunk together is no projection, and what
    one laps the other does not undo: what is left is looked for where the decoder needs it, and what the
    analysis can say of it is found by least squares. Components are largest in the error of voxels, which
    lapping weighs.

    Parameters
    ----------
    decoders
        Both, of which the last says what is left.
    x
        Chunks (batch, 1, z, y, x).
    """
    analysis, prior, new = coder.analysis, coder.prior, slice(known, None)
    rows, stride = analysis.linear.weight, analysis.linear.stride
    shape = rows[new].shape
    with torch.no_grad():
        subbands = analysis.subbands(x)
        cells = latent_cells(subbands, stride)
        y = analysis.linear(subbands)
        y[:, new] = 0.0
        missing = [latent_cells(_missed(decoder, x, y), stride) for decoder in decoders]
        metric = _metric(decoders[-1])
        # Of what is multiplied with that root the squares add up to those of voxels.
        root = torch.linalg.cholesky(metric)
        said = _least_squares(cells, missing[-1].double() @ root)
        basis, energy = principal(cells @ said, len(rows) - known)
        rows[new] = (basis @ said.T).reshape(shape)
        added = cells @ said @ basis.T
        for decoder, wanted in zip(decoders, missing, strict=True):
            decoder.linear.weight[new] = _least_squares(added, wanted).reshape(shape)
        deviation = energy.clamp_min(1e-6).sqrt().float()
        analysis.latent_scale[new] = deviation
        prior.start(deviation, known)
        # As coarse, in voxels, as the last group there was; and at the finest quality all of them finer.
        last = next(part for part in prior.passes if part.last == known)
        before = slice(last.first, last.last)
        made = decoders[-1].linear.weight.flatten(1) * (1.0 + decoders[-1].rescaled.scale[-1, :, None])
        length = ((made.double() @ metric) * made).sum(dim=1).log2().float() / 2
        gain = (prior.log_gain[:, before] - length[before]).mean(dim=1, keepdim=True)
        prior.log_gain[:, new] = gain + length[new]
        prior.log_gain[-1] += FINER


def _metric(decoder: LinearSynthesis) -> Tensor:
    """How numbers of one cell of a decoder's subbands add up to squared error of voxels, float64."""
    subbands, *stride = decoder.linear.weight.shape[1:]
    first = [SURROUNDED // 2 * s for s in stride]
    responses = []
    for some in torch.split(torch.arange(subbands * math.prod(stride)), RESPONSES):
        subband, *within = torch.unravel_index(some, (subbands, *stride))
        z, y, x = (start + places for start, places in zip(first, within, strict=True))
        alone = decoder.linear.weight.new_zeros(len(some), subbands, *[SURROUNDED * s for s in stride])
        alone[range(len(some)), subband, z, y, x] = 1.0
        responses.append(decoder.lapped(decoder.wavelet.inverse(alone)).flatten(1).double())
    response = torch.cat(responses)
    return response @ response.T


def _missed(decoder: LinearSynthesis, x: Tensor, y: Tensor) -> Tensor:
    """What a decoder would have to add to its subbands, at the finest quality, to make x of latents y."""
    finest = torch.full((len(x),), QUALITIES - 1.0).to(x)
    missed = x - decoder.unfiltered(y, y, finest)
    for axis, dim in zip("zyx", (2, 3, 4), strict=True):
        size = missed.shape[dim]
        if axis in decoder.lapped.axes and size != decoder.lapped.cell[dim - 2]:
            undone = decoder.lapped.axes[axis](size, inverse=True)
            missed = torch.linalg.solve(undone, missed.movedim(dim, -2)).movedim(-2, dim)
    return torch.as_tensor(decoder.wavelet(missed))


def _least_squares(given: Tensor, wanted: Tensor) -> Tensor:
    """What to multiply samples (samples, numbers) with to come nearest to others."""
    exact = given.double()
    return torch.as_tensor(torch.linalg.solve(exact.T @ exact, exact.T @ wanted.double()).float())

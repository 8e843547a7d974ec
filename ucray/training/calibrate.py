"""From trained floats to the weights that are stored: integer tables, fitted frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.codec.chunk import round_latents
from ucray.codec.codebook import quantise_codes
from ucray.codec.entropy import SCALE_UNITS, StreamTables, logistic_weights, to_frequencies
from ucray.codec.network import Synthesis, load_network
from ucray.codec.prior import KNOTS, LatentPrior
from ucray.codec.weights import Weights
from ucray.config import QUALITIES, CodecConfig
from ucray.training.loss import Coder

PRIOR_COUNT = 400.0
"""Observations that the logistic prior is worth against the counted symbols of a table."""

CALIBRATION_QUALITIES = tuple(range(16, QUALITIES, 32))


def freeze(coder: Coder) -> None:
    """Round the coder to what the weights file stores, so that stage 2 sees the true stream."""
    prior = coder.prior
    entries = coder.codebook.entries.half().float()
    prior.fold(entries)
    integers = prior.to_integers()
    with torch.no_grad():
        coder.codebook.entries.copy_(entries)
        _load_prior(prior, integers.mean, integers.mean_step, integers.scale, integers.base, integers.gain)
        for value in coder.analysis.state_dict().values():
            value.copy_(value.half())
    coder.requires_grad_(False)


def to_weights(
    config: CodecConfig,
    coder: Coder,
    teacher: Synthesis,
    student: Synthesis,
    batches: Sequence[Tensor],
    training: Mapping[str, Any],
) -> Weights:
    """Weights of trained networks; frequencies are counted on `batches` (batch, 1, z, y, x)."""
    integers = coder.prior.to_integers()
    logistic = logistic_weights()
    draft = StreamTables(
        mean=integers.mean,
        mean_step=integers.mean_step,
        scale=integers.scale,
        base=integers.base,
        gain=integers.gain,
        reach=np.array([(len(w) - 2) // 2 for w in logistic], dtype=np.int16),
        frequencies=np.concatenate([to_frequencies(w) for w in logistic]),
        code_frequencies=np.stack([to_frequencies(np.ones(config.codes))] * config.code_stages),
        code_stride=config.code_stride,
    )
    symbols, codes = _count(config, coder, draft, batches)
    frequencies = [
        to_frequencies(counted + prior / prior.sum() * PRIOR_COUNT)
        for counted, prior in zip(symbols, logistic, strict=True)
    ]
    stream: dict[str, npt.NDArray[np.generic]] = {
        "codebook": coder.codebook.entries.half().cpu().numpy(),
        "mean": draft.mean,
        "mean_step": draft.mean_step,
        "scale": draft.scale,
        "base": draft.base,
        "gain": draft.gain,
        "reach": draft.reach,
        "frequencies": np.concatenate(frequencies),
        "code_frequencies": np.stack([to_frequencies(row + 1.0) for row in codes]),
    }
    tensors = {f"stream.{name}": array for name, array in stream.items()}
    for part, module in (("analysis", coder.analysis), ("teacher", teacher), ("student", student)):
        tensors |= {
            f"{part}.{name}": value.half().cpu().numpy() for name, value in module.state_dict().items()
        }
    weights = Weights(config, tensors, training)
    weights.check_stream()
    return weights


def load_weights(weights: Weights, coder: Coder, teacher: Synthesis, student: Synthesis) -> None:
    """Start networks of the same configuration from stored weights."""
    for part, module in (("analysis", coder.analysis), ("teacher", teacher), ("student", student)):
        load_network(weights, part, module)
    stream = weights.stream
    with torch.no_grad():
        coder.codebook.entries.copy_(torch.from_numpy(weights.codebook.astype(np.float32)))
        coder.codebook.sums.copy_(coder.codebook.entries)
        coder.codebook.counts.fill_(1.0)
        coder.codebook.started.fill_(True)
        _load_prior(coder.prior, stream.mean, stream.mean_step, stream.scale, stream.base, stream.gain)


def _load_prior(
    prior: LatentPrior,
    mean: npt.NDArray[np.int8],
    mean_step: npt.NDArray[np.float32],
    scale: npt.NDArray[np.int8],
    base: npt.NDArray[np.int16],
    gain: npt.NDArray[np.int16],
) -> None:
    knots = np.round(np.linspace(0, QUALITIES - 1, KNOTS)).astype(int)
    with torch.no_grad():
        prior.mean.copy_(torch.from_numpy(mean * mean_step).reshape(prior.mean.shape))
        prior.log_scale.copy_(
            torch.from_numpy(scale.astype(np.float32) / SCALE_UNITS).reshape(prior.log_scale.shape)
        )
        prior.base.copy_(torch.from_numpy(base.astype(np.float32) / SCALE_UNITS))
        prior.log_gain.copy_(torch.from_numpy(gain[knots].astype(np.float32) / SCALE_UNITS))


def _count(
    config: CodecConfig, coder: Coder, draft: StreamTables, batches: Sequence[Tensor]
) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Symbols by frequency table (both signs counted alike), and codes by stage."""
    reach = draft.reach.astype(np.int64)
    symbol_counts = [np.zeros(2 * r + 2) for r in reach]
    code_counts = np.zeros((config.code_stages, config.codes))
    for batch in batches:
        with torch.no_grad():
            y, z = coder.analysis(batch)
            codes = quantise_codes(coder.codebook.entries, z).to(torch.uint8).cpu().numpy()
        for one_y, one_codes in zip(y.cpu().numpy(), codes, strict=True):
            for stage, row in enumerate(one_codes):
                code_counts[stage] += np.bincount(row.reshape(-1), minlength=config.codes)
            centred = one_y - draft.means(one_codes)
            for quality in CALIBRATION_QUALITIES:
                gain = np.exp2(draft.log_gain(quality))[:, None, None, None]
                symbols = round_latents(centred * gain).astype(np.int64).reshape(-1)
                tables = draft.table_indices(one_codes, quality).reshape(-1)
                for table in np.unique(tables):
                    found = symbols[tables == table]
                    size = np.where(np.abs(found) > reach[table], reach[table] + 1, found) + reach[table]
                    counts = np.bincount(size, minlength=2 * int(reach[table]) + 2).astype(np.float64)
                    counts[:-1] = (counts[:-1] + counts[-2::-1]) / 2
                    symbol_counts[table] += counts
    return symbol_counts, code_counts

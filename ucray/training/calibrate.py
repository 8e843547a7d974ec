"""From trained floats to the weights that are stored: whole numbers, fitted frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucray.codec.anticipation import anticipated
from ucray.codec.codebook import quantise_codes, vectors_of
from ucray.codec.context import FEATURE_UNITS, TABLES
from ucray.codec.frequencies import FrequencyTables, logistic_weights, to_frequencies
from ucray.codec.lapping import Lapping
from ucray.codec.linear import LinearSynthesis
from ucray.codec.network import analysis_of, load_network
from ucray.codec.passes import Pass
from ucray.codec.residual import to_cells
from ucray.codec.stream import StreamModel
from ucray.codec.threads import one_thread
from ucray.codec.unlapping import LARGEST_ENTRY, SHIFT
from ucray.codec.weights import SCALE, Weights, stream_tensors
from ucray.config import QUALITIES, CodecConfig
from ucray.training.loss import Coder, in_fewer_bits
from ucray.training.widening import take_first

PRIOR_COUNT = 400.0
"""Observations that the logistic prior is worth against the counted symbols of a table."""

FIRST_COUNT = 4
"""Every so many of the batches are counted first, where paths are chosen by what is counted."""

CALIBRATION_QUALITIES = tuple(range(16, QUALITIES, 32))


def freeze(coder: Coder) -> None:
    """Round the coder to what the weights file stores, so that stage 2 sees the true stream."""
    with torch.no_grad():
        entries = (coder.codebook.entries * FEATURE_UNITS).round() / FEATURE_UNITS
        coder.codebook.entries.copy_(entries)
        coder.prior.from_integers(coder.prior.to_integers(entries))
        for value in coder.analysis.state_dict().values():
            value.copy_(value.half())
    coder.requires_grad_(False)


def to_weights(
    config: CodecConfig,
    coder: Coder,
    teacher: LinearSynthesis,
    student: LinearSynthesis,
    batches: Sequence[Tensor],
    training: Mapping[str, Any],
) -> Weights:
    """Weights of trained networks; frequencies are counted on `batches` (batch, 1, z, y, x)."""
    logistic = logistic_weights(config.first_dependent or TABLES)
    stream = StreamModel(
        coder.prior.to_integers(coder.codebook.entries),
        FrequencyTables(
            reach=np.array([(len(w) - 2) // 2 for w in logistic], dtype=np.int16),
            frequencies=np.concatenate([to_frequencies(w) for w in logistic]),
            code_frequencies=_rows(np.ones((config.code_stages, config.codes))),
            states=config.trellis_states,
        ),
    )
    # Paths are chosen by the frequencies: what is counted with the logistic's says where to count again.
    for some in [batches] if config.first_dependent is None else [batches[::FIRST_COUNT], batches]:
        # Chunks are quantised one after the other: as when they are coded, threads would wait for each other.
        with one_thread(torch.device("cpu")):
            counts = _count(config, coder, student, stream, some)
        counted = [
            to_frequencies(count + prior / prior.sum() * PRIOR_COUNT)
            for count, prior in zip(counts.by_table(), logistic, strict=True)
        ]
        frequencies = FrequencyTables(
            stream.frequencies.reach,
            np.concatenate(counted),
            _rows(counts.codes + 1.0),
            config.trellis_states,
        )
        stream = StreamModel(stream.context, frequencies)
    tensors = stream_tensors(stream) | counts.reference(coder.analysis.lapped)
    tensors |= {f"analysis.{name}": _half(value) for name, value in coder.analysis.state_dict().items()}
    for part, module in (("teacher", teacher), ("student", student)):
        for name, value in module.state_dict().items():
            tensors |= _small(f"{part}.{name}", value)
    weights = Weights(config, tensors, training)
    weights.check_stream()
    return weights


def load_coder(weights: Weights, coder: Coder) -> list[Pass]:
    """Start a coder of the same configuration, but for its order and more latents, from stored weights.

    What is left for it to learn are the networks of the passes that are given back.
    """
    known = analysis_of(weights.config)
    load_network(weights, "analysis", known)
    take_first(coder.analysis.state_dict(), known.state_dict())
    context = weights.stream.context
    with torch.no_grad():
        entries = context.codebook.astype(np.float32) / FEATURE_UNITS
        coder.codebook.entries.copy_(torch.from_numpy(entries))
        coder.codebook.sums.copy_(coder.codebook.entries)
        coder.codebook.counts.fill_(1.0)
    return coder.prior.from_integers(context)


class _Counts:
    """What calibration counts: symbols by table, codes by stage, moments for the linear reference."""

    def __init__(self, config: CodecConfig, reach: npt.NDArray[np.int64]) -> None:
        self.symbols = np.zeros(int((2 * reach + 2).sum()))
        self._reach = reach
        self.codes = np.zeros((config.code_stages, config.codes))
        self._latents = np.zeros((config.latents, config.latents))
        self._voxels = np.zeros((config.latents, int(np.prod(config.latent_cell))))
        self._cell = config.latent_cell

    def by_table(self) -> list[npt.NDArray[np.float64]]:
        """Letters of each table; symbols of both signs count alike, the escape stands last."""
        found = np.split(self.symbols, np.cumsum(2 * self._reach + 2)[:-1])
        return [np.append((seen[:-1] + seen[-2::-1]) / 2, seen[-1]) for seen in found]

    def add_reconstruction(self, latents: npt.NDArray[np.int64], chunk: npt.NDArray[np.float32]) -> None:
        """Whole latents (z, y, x, latents) and the normalised, lapped chunk they stand for."""
        inputs = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
        self._latents += inputs.T @ inputs
        self._voxels += inputs.T @ to_cells(chunk.astype(np.float64), self._cell)

    def reference(self, lapping: Lapping) -> dict[str, npt.NDArray[np.generic]]:
        """The linear reconstruction of least squared error, in whole numbers, and the lapping undone."""
        ridge = 1e-6 * np.trace(self._latents) / len(self._latents) + 1e-9
        solved = np.linalg.solve(self._latents + ridge * np.eye(len(self._latents)), self._voxels)
        largest = max(float(np.abs(solved).max()), 2.0**-40)
        shift = int(np.floor(np.log2(32767.0 / largest)))
        inverses = {
            f"reference.lapped.{name}": _whole_inverse(value) for name, value in lapping.state_dict().items()
        }
        return inverses | {
            "reference.weight": np.rint(solved * 2.0**shift).astype(np.int16),
            "reference.shift": np.array([shift], dtype=np.uint8),
        }


def _count(
    config: CodecConfig,
    coder: Coder,
    student: LinearSynthesis,
    draft: StreamModel,
    batches: Sequence[Tensor],
) -> _Counts:
    """Count over batches."""
    reach = draft.frequencies.reach.astype(np.int64)
    counts = _Counts(config, reach)
    for batch in batches:
        with torch.no_grad():
            lapped = coder.analysis.lapped(batch)[:, 0].cpu().numpy()
        for quality in CALIBRATION_QUALITIES:
            qualities = torch.full((len(batch),), float(quality)).to(batch)
            with torch.no_grad():
                with in_fewer_bits(batch):
                    y, z = coder.analysis(batch, qualities)
                chosen = quantise_codes(coder.codebook.entries, z)
                side = vectors_of(coder.codebook.entries, chosen).movedim(-1, 1)
                step = torch.exp2(-coder.prior.gain_at(qualities))
                y = anticipated(y, side, qualities, step, coder.analysis, student)
            codes = chosen.to(torch.uint8).cpu().numpy()
            latents = y.permute(0, 2, 3, 4, 1).cpu().numpy() / draft.context.unit
            for values, one_codes, chunk in zip(latents, codes, lapped, strict=True):
                for stage, row in enumerate(one_codes):
                    counts.codes[stage] += np.bincount(row.reshape(-1), minlength=config.codes)
                symbols, coded = draft.quantise(one_codes, values, quality)
                if quality == CALIBRATION_QUALITIES[-2]:
                    counts.add_reconstruction(coded.latents, chunk)
                for tables, found in zip(symbols.tables, symbols.values, strict=True):
                    counts.symbols += np.bincount(
                        draft.frequencies.letters_of(tables, found), minlength=counts.symbols.size
                    )
    return counts


def _rows(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Frequencies of each row; there may be none."""
    rows = [to_frequencies(row) for row in weights]
    return np.array(rows, dtype=np.uint16).reshape(weights.shape)


def _whole_inverse(block: Tensor) -> npt.NDArray[np.generic]:
    inverse = np.linalg.inv(block.cpu().numpy().astype(np.float64)) * 2.0**SHIFT
    return np.clip(np.rint(inverse), -LARGEST_ENTRY, LARGEST_ENTRY).astype(np.int16)


def _half(value: Tensor) -> npt.NDArray[np.generic]:
    return np.asarray(value.half().cpu().numpy())


def _small(name: str, value: Tensor) -> dict[str, npt.NDArray[np.generic]]:
    """A synthesis' tensor as it is stored: matrices in eight bits, with a scale for each row."""
    if value.dim() < 2 or not name.endswith(".weight"):
        return {name: _half(value)}
    rows = value.detach().flatten(1).float().cpu()
    scale = (rows.abs().amax(dim=1) / 127.0).clamp_min(1e-12)
    whole = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
    return {name: whole.numpy(), name + SCALE: scale.numpy()}

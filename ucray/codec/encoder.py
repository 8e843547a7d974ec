"""Chunks of voxels to bytes: the networks, the choice of kind, packing.

Encoding has two halves, so that a GPU does the first and CPUs the second: `ChunkEncoder.drafts` runs
the networks, `pack` codes the integers that come out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from ucray.codec import frames
from ucray.codec.anticipation import anticipated
from ucray.codec.bitstream import BoundedBody, Chunk, Kind, NeuralBody, write_chunk
from ucray.codec.chunk import ChunkFormat, Voxels
from ucray.codec.codebook import quantise_codes, vectors_of
from ucray.codec.context import FEATURE_UNITS, LARGEST_LATENT, Codes
from ucray.codec.decoder import ChunkDecoder, batches, channels_last, ready
from ucray.codec.fill import fill_mask, keep_off_fill, pack_mask
from ucray.codec.importance import ChunkImportance
from ucray.codec.inpaint import inpaint
from ucray.codec.network import analysis_of, load_network
from ucray.codec.residual import LARGEST_BOUND, Residual, apply_residual, encode_residual, residual_of
from ucray.codec.sensitivity import Sensitivity
from ucray.codec.stream import CodedLatents, StreamModel, Symbols
from ucray.codec.threads import one_thread
from ucray.codec.weights import Weights
from ucray.errors import SettingsError
from ucray.grid import Box, Shape3, triple
from ucray.quality import ErrorSum

RAW_LEVEL = 3
"""zstd level of raw chunks."""

RAW_PARTS = (64, 8)
"""Of a chunk's voxels, the parts that are packed to learn whether the whole could be worth it."""


@dataclass(frozen=True)
class Draft:
    """One chunk between the two halves of encoding: integers, no voxels.

    `symbols` belong to a neural chunk; `value` to a constant one; `raw`, voxels in their bytes, to any other,
    which they may be packed shorter than; `residual` to a bounded one. `error` is that of the neural form.
    """

    origin: Shape3 | None
    mask: bytes
    value: bytes
    raw: bytes
    symbols: Symbols | None
    error: ErrorSum
    residual: Residual | None = None


@dataclass(frozen=True)
class Latents:
    """What the networks say of one chunk at one quality.

    `codes` uint8 (stages, z, y, x); `values` float32 (z, y, x, latents), in units of whole latents.
    """

    codes: Codes
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """A chunk before any quality is chosen.

    `draft` is None where there is nothing but fill; `neural` says whether the networks are needed. Without
    `importance` all errors weigh the same; a `shift` (z, y, x, latents) is added to latents before rounding.
    """

    voxels: Voxels
    draft: Draft | None
    neural: bool
    importance: ChunkImportance | None = None
    shift: npt.NDArray[np.float32] | None = None

    def quality(self, quality: int) -> int:
        """The chunk's own quality where that of the volume is `quality`."""
        return quality if self.importance is None else self.importance.quality(quality)


@dataclass(frozen=True)
class Packed:
    """A coded chunk and its figures; no bytes at all for a chunk of nothing but fill."""

    data: bytes
    kind: Kind
    error: ErrorSum


class ChunkEncoder:
    """Encodes chunks: networks and, with `pack`, entropy coding."""

    def __init__(
        self,
        weights: Weights,
        chunk: ChunkFormat,
        *,
        device: str = "cpu",
        max_error: float | None = None,
    ) -> None:
        self.decoder = ChunkDecoder(weights, chunk, device=device)
        self.format = chunk
        self.stream = weights.stream
        if max_error is not None and not 0.0 <= max_error <= LARGEST_BOUND:
            raise SettingsError(f"a bound of {max_error} on errors is not within 0 and {LARGEST_BOUND:g}")
        self._max_error = max_error
        self._reference = None if max_error is None else weights.reference
        self._digest = weights.stream_digest
        self.device = torch.device(device)
        entries = weights.stream.context.codebook.astype(np.float32) / FEATURE_UNITS
        self._codebook = torch.from_numpy(entries.astype(np.float32)).to(self.device)
        self._analysis = analysis_of(weights.config)
        load_network(weights, "analysis", self._analysis)
        self._analysis = ready(self._analysis, self.device)

    def latents(self, chunks: Sequence[Voxels], qualities: Sequence[int]) -> list[Latents]:
        """Run the analysis on chunks (z, y, x), cut off by the volume's end or not, each at its quality."""
        with one_thread(self.device):
            return [
                latents
                for batch in batches(list(zip(chunks, qualities, strict=True)), self.device)
                for latents in self._latents_of(*batch)
            ]

    def _latents_of(self, full: Sequence[tuple[Voxels, int]], wanted: int) -> list[Latents]:
        padded = np.stack([self._padded(voxels) for voxels, _ in full])[:, None]
        mask = torch.from_numpy(fill_mask(padded, self.format.fill_value))
        # What overflows here comes out of the networks as no number, and `drafts` codes it raw.
        with np.errstate(over="ignore"):
            values = padded.astype(np.float32)
            values -= np.float32(self.format.offset)
            values /= np.float32(self.format.scale)
        with torch.inference_mode():
            x = inpaint(torch.from_numpy(values).to(self.device), mask.to(self.device))
            qualities = torch.tensor([float(quality) for _, quality in full], device=self.device)
            y, z = self._analysis(channels_last(x), qualities)
            chosen = quantise_codes(self._codebook, z)
            if self._reference is None:
                y = self._anticipated(y, chosen, qualities)
            codes = chosen.to(torch.uint8).cpu().numpy()
        values = y.permute(0, 2, 3, 4, 1).cpu().numpy() / self.stream.context.unit
        return [Latents(*found) for found in list(zip(codes, values, strict=True))[:wanted]]

    def _anticipated(self, y: torch.Tensor, codes: torch.Tensor, qualities: torch.Tensor) -> torch.Tensor:
        """Latents to round, where they are decoded by a network that filters."""
        unit = self.stream.context.unit
        step = np.stack([self.stream.rounding_step(int(quality)) * unit for quality in qualities])
        prior = vectors_of(self._codebook, codes).movedim(-1, 1)
        steps = torch.from_numpy(step).to(y)
        return anticipated(y, prior, qualities, steps, self._analysis, self.decoder.synthesis)

    def drafts(
        self,
        chunks: Sequence[Voxels],
        quality: int,
        origins: Sequence[Shape3 | None] | None = None,
        importance: Sequence[ChunkImportance | None] | None = None,
    ) -> list[Draft | None]:
        """First half of encoding chunks (z, y, x); None for one that is nothing but fill."""
        return self.drafts_at(self.prepare(chunks, origins, importance), quality)

    def prepare(
        self,
        chunks: Sequence[Voxels],
        origins: Sequence[Shape3 | None] | None = None,
        importance: Sequence[ChunkImportance | None] | None = None,
    ) -> list[Prepared]:
        """Find out of chunks (z, y, x) what no quality changes."""
        places = origins if origins is not None else [None] * len(chunks)
        weights = importance if importance is not None else [None] * len(chunks)
        drafts = [self._exact_draft(voxels, place) for voxels, place in zip(chunks, places, strict=True)]
        return [
            Prepared(voxels, draft, draft is not None and self._fits(draft, voxels), weight)
            for voxels, draft, weight in zip(chunks, drafts, weights, strict=True)
        ]

    def drafts_at(self, prepared: Sequence[Prepared], quality: int) -> list[Draft | None]:
        """Drafts of prepared chunks at a quality of the volume, with their errors."""
        with one_thread(self.device):
            return self._drafts_at(prepared, quality)

    def _drafts_at(self, prepared: Sequence[Prepared], quality: int) -> list[Draft | None]:
        found = [one.draft for one in prepared]
        neural = [i for i, one in enumerate(prepared) if one.neural]
        latents = self._latents_at([prepared[i] for i in neural], quality)
        finite = {i: bool(np.isfinite(one.values).all()) for i, one in zip(neural, latents, strict=True)}
        coded = [self._quantised(prepared[i], one, quality) for i, one in zip(neural, latents, strict=True)]
        if self._reference is not None:
            for i, (symbols, quantised) in zip(neural, coded, strict=True):
                found[i] = self._bounded_draft(prepared[i], finite[i], symbols, quantised)
            return found
        decoded = self.decoder.reconstruct([one for _, one in coded])
        for i, (symbols, _), voxels in zip(neural, coded, decoded, strict=True):
            found[i] = self._neural_draft(prepared[i], finite[i], symbols, voxels)
        return found

    def size_at(self, prepared: Sequence[Prepared], quality: int) -> int:
        """Bytes that prepared chunks take at a quality, without decoding them."""
        with one_thread(self.device):
            return self._size_at(prepared, quality)

    def _size_at(self, prepared: Sequence[Prepared], quality: int) -> int:
        latents = iter(self._latents_at([one for one in prepared if one.neural], quality))
        size = 0
        for one in prepared:
            draft = one.draft
            if draft is not None and one.neural:
                draft = replace(draft, symbols=self._quantised(one, next(latents), quality)[0])
            size += len(self.pack(draft).data)
        return size

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """What makes weights of a chunk's latents."""
        with one_thread(self.device):
            return Sensitivity(self._analysis, self.format.shape)

    def pack(self, draft: Draft | None) -> Packed:
        """Second half of encoding."""
        return pack(draft, self.stream, self._digest)

    def _exact_draft(self, voxels: Voxels, origin: Shape3 | None) -> Draft | None:
        """What needs no network: fill, constants, numbers that are none; and the raw form of the rest."""
        mask = fill_mask(voxels, self.format.fill_value)
        if mask.all():
            return None
        padded = self._padded(voxels)
        packed_mask = pack_mask(fill_mask(padded, self.format.fill_value)) if mask.any() else b""
        draft = Draft(origin, packed_mask, b"", b"", None, ErrorSum(voxels.size))
        kept = voxels[~mask] if mask.any() else voxels.reshape(-1)
        if kept.min() == kept.max():
            return replace(draft, value=_little_endian(kept[0]))
        return replace(draft, raw=_little_endian(padded))

    def _fits(self, draft: Draft, voxels: Voxels) -> bool:
        """Whether a chunk is one for the networks: no constant, and every voxel a number."""
        return not draft.value and bool(
            np.issubdtype(voxels.dtype, np.integer)
            or np.isfinite(voxels[~fill_mask(voxels, self.format.fill_value)]).all()
        )

    def _neural_draft(self, prepared: Prepared, finite: bool, symbols: Symbols, decoded: Voxels) -> Draft:
        draft, voxels = prepared.draft, prepared.voxels
        assert draft is not None
        mask = fill_mask(voxels, self.format.fill_value)
        inside = Box((0, 0, 0), triple(iter(voxels.shape))).slices
        error = ErrorSum.between(voxels, keep_off_fill(decoded[inside], mask, self.format.fill_value))
        if not (finite and math.isfinite(error.squared)):
            return replace(draft, mask=b"")
        return replace(draft, symbols=symbols, error=error)

    def _bounded_draft(
        self, prepared: Prepared, finite: bool, symbols: Symbols, coded: CodedLatents
    ) -> Draft:
        draft, voxels = prepared.draft, prepared.voxels
        assert draft is not None
        assert self._reference is not None
        assert self._max_error is not None
        floating = np.issubdtype(np.dtype(self.format.dtype), np.floating)
        if not finite or (floating and self._max_error == 0.0):
            return replace(draft, mask=b"")
        inside = Box((0, 0, 0), triple(iter(voxels.shape))).slices
        mask = fill_mask(voxels, self.format.fill_value)
        kept = np.zeros(self.format.shape, dtype=bool)
        kept[inside] = ~mask
        predicted = self._reference.predict(coded.latents, self.format)
        cell = self._reference.cell
        bound = self._max_error
        if floating:
            # A decoded voxel is rounded to float32 in the end, by half a unit in its last place.
            largest = np.float32(np.abs(voxels[~mask]).max()) + np.float32(bound)
            bound = max(bound - float(np.spacing(largest)) / 2, bound / 2)
        frequencies = self.stream.frequencies
        residual = residual_of(self._padded(voxels), kept, predicted, bound, cell, frequencies)
        if residual is None:
            return replace(draft, mask=b"")
        decoded = apply_residual(predicted, residual, self.format.dtype, cell)[inside]
        error = ErrorSum.between(voxels, np.where(mask, voxels, decoded))
        if not error.maximum <= self._max_error:
            return replace(draft, mask=b"")
        return replace(draft, symbols=symbols, residual=residual, error=error)

    def _latents_at(self, prepared: Sequence[Prepared], quality: int) -> list[Latents]:
        return self.latents([one.voxels for one in prepared], [one.quality(quality) for one in prepared])

    def _quantised(self, prepared: Prepared, latents: Latents, quality: int) -> tuple[Symbols, CodedLatents]:
        # Values that are no numbers never leave: their draft is raw.
        values = latents.values if prepared.shift is None else latents.values + prepared.shift
        if not np.isfinite(values).all():
            values = np.nan_to_num(values, posinf=LARGEST_LATENT, neginf=-LARGEST_LATENT)
        weights = None if prepared.importance is None else prepared.importance.weights
        return self.stream.quantise(latents.codes, values, prepared.quality(quality), weights)

    def decoded(self, prepared: Prepared, latents: Latents, quality: int) -> Voxels:
        """What comes back of a prepared chunk's latents at a quality of the volume."""
        (voxels,) = self.decoder.reconstruct([self._quantised(prepared, latents, quality)[1]])
        return voxels

    def encode(
        self,
        voxels: Voxels,
        quality: int,
        origin: Shape3 | None = None,
        importance: ChunkImportance | None = None,
    ) -> Packed:
        """Both halves of encoding one chunk."""
        (draft,) = self.drafts([voxels], quality, [origin], [importance])
        return pack(draft, self.stream, self._digest)

    def _padded(self, voxels: Voxels) -> Voxels:
        if any(n > c for n, c in zip(voxels.shape, self.format.shape, strict=True)):
            raise SettingsError(f"a chunk of shape {voxels.shape} is larger than {self.format.shape}")
        missing = [(0, c - n) for n, c in zip(voxels.shape, self.format.shape, strict=True)]
        return np.pad(voxels, missing, mode="edge") if voxels.shape != self.format.shape else voxels


def pack(draft: Draft | None, stream: StreamModel, stream_digest: str) -> Packed:
    """Second half of encoding: code a draft and choose the shortest kind. Needs no network."""
    if draft is None:
        return Packed(b"", Kind.CONSTANT, ErrorSum())
    digest = bytes.fromhex(stream_digest)
    if draft.value:
        data = write_chunk(Chunk(Kind.CONSTANT, draft.origin, draft.mask, draft.value), digest)
        return Packed(data, Kind.CONSTANT, draft.error)
    coded = None if draft.symbols is None else _coded(draft, draft.symbols, stream, digest)
    if coded is not None:
        for part in RAW_PARTS:
            if len(frames.pack(draft.raw[: len(draft.raw) // part], RAW_LEVEL)) >= len(coded.data):
                return coded
    raw = write_chunk(Chunk(Kind.RAW, draft.origin, b"", frames.pack(draft.raw, RAW_LEVEL)), digest)
    if coded is not None and len(coded.data) < len(raw):
        return coded
    return Packed(raw, Kind.RAW, ErrorSum(draft.error.voxels))


def _coded(draft: Draft, symbols: Symbols, stream: StreamModel, digest: bytes) -> Packed:
    """The form that has symbols: neural, or bounded where there is a residual."""
    body: NeuralBody | BoundedBody
    body = NeuralBody(symbols.quality, len(symbols.tables), *stream.encode(symbols))
    kind = Kind.NEURAL
    if draft.residual is not None:
        kind, body = Kind.BOUNDED, BoundedBody(body, encode_residual(draft.residual, stream.frequencies))
    return Packed(write_chunk(Chunk(kind, draft.origin, draft.mask, body), digest), kind, draft.error)


def _little_endian(voxels: Voxels | np.generic) -> bytes:
    array = np.ascontiguousarray(voxels)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()

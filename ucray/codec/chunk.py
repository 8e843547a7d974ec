"""Chunks of voxels to bytes and back: normalisation, fill, choice of kind, reconstruction.

Encoding has two halves, so that a GPU does the first and CPUs the second: `ChunkEncoder.drafts` runs
the networks, `pack` codes the integers that come out. Decoding needs the stream and a student.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import zstd

from ucray.codec import entropy
from ucray.codec.bitstream import Chunk, Kind, NeuralBody, read_chunk, write_chunk
from ucray.codec.codebook import quantise_codes
from ucray.codec.fill import fill_mask, inpaint, keep_off_fill, pack_mask, unpack_exactly, unpack_mask
from ucray.codec.network import Analysis, Synthesis, load_network
from ucray.codec.rate import ROUNDING
from ucray.codec.weights import Weights
from ucray.errors import ChunkError, DtypeError, SettingsError
from ucray.grid import Box, Shape3, format_shape, triple
from ucray.quality import ErrorSum

Voxels = npt.NDArray[np.generic]
Network = TypeVar("Network", bound=torch.nn.Module)
Item = TypeVar("Item")

DTYPES = ("uint8", "uint16", "int16", "float32")
"""Voxel types that are served."""

RAW_LEVEL = 3
"""zstd level of raw chunks."""

LARGEST_SYMBOL = 32767

PAIR = 2
"""Chunks that go through the networks together, always as many: a lone one is doubled.

PyTorch convolves a batch of one on a CPU by a path that is five times slower and rounds differently.
With one fixed batch the result for a chunk depends on nothing but the chunk.
"""


@dataclass(frozen=True)
class ChunkFormat:
    """What all chunks of an archive share.

    Parameters
    ----------
    shape
        Voxels of a chunk (z, y, x).
    dtype
        One of DTYPES.
    fill_value
        The value that stands for "nothing here".
    offset, scale
        The networks see (voxel - offset) / scale: mean and standard deviation of the volume.
    """

    shape: Shape3
    dtype: str
    fill_value: float
    offset: float
    scale: float

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DtypeError(f"voxels of type {self.dtype} are not served; {', '.join(DTYPES)} are")
        if not (math.isfinite(self.offset) and math.isfinite(self.scale) and self.scale > 0):
            raise SettingsError(f"a volume scale of {self.scale} and offset of {self.offset} cannot be used")

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.voxels * np.dtype(self.dtype).itemsize

    def check_stride(self, stride: Shape3) -> None:
        """Refuse a chunk shape that the networks cannot divide evenly."""
        if any(n % s for n, s in zip(self.shape, stride, strict=True)):
            raise SettingsError(
                f"chunk shape {format_shape(self.shape)} must be a multiple of {format_shape(stride)} "
                "with these weights"
            )


@dataclass(frozen=True)
class Draft:
    """One chunk between the two halves of encoding: integers, no voxels.

    `codes`, `symbols` and `quality` belong to a neural chunk; `value` to a constant one; `raw` is a
    zstd frame, present where it might be the shorter form. `error` is that of the neural form;
    `neural` is False where there can be none.
    """

    origin: Shape3 | None
    mask: bytes
    value: bytes
    raw: bytes
    quality: int
    codes: npt.NDArray[np.uint8]
    symbols: npt.NDArray[np.int16]
    error: ErrorSum
    neural: bool


@dataclass(frozen=True)
class Packed:
    """A coded chunk and its figures; no bytes at all for a chunk of nothing but fill."""

    data: bytes
    kind: Kind
    error: ErrorSum


@dataclass(frozen=True)
class Coded:
    """The integers of one neural chunk: codes (stages, z, y, x), symbols (latents, Z, Y, X), quality."""

    codes: npt.NDArray[np.uint8]
    symbols: npt.NDArray[np.integer]
    quality: int


@dataclass(frozen=True)
class Latents:
    """What the networks say of one chunk, before any quality is chosen.

    `centred` are latents less their mean, float32 (latents, Z, Y, X); `codes` uint8 (stages, z, y, x).
    """

    codes: npt.NDArray[np.uint8]
    centred: npt.NDArray[np.float32]


class ChunkDecoder:
    """Decodes chunks with one network, the student unless told otherwise."""

    def __init__(
        self, weights: Weights, chunk: ChunkFormat, *, part: str = "student", device: str = "cpu"
    ) -> None:
        chunk.check_stride(weights.config.stride)
        self.format = chunk
        self._config = weights.config
        self._stream = weights.stream
        self._digest = bytes.fromhex(weights.stream_digest)[:4]
        self._device = torch.device(device)
        self._codebook = torch.from_numpy(weights.codebook.astype(np.float32)).to(self._device)
        sizes = weights.config.teacher if part == "teacher" else weights.config.student
        self._synthesis = Synthesis(weights.config, sizes)
        load_network(weights, part, self._synthesis)
        self._synthesis = _ready(self._synthesis, self._device)

    def decode(self, data: bytes, origin: Shape3 | None = None) -> Voxels:
        """Voxels of one chunk, in the archive's dtype and chunk shape.

        Parameters
        ----------
        data
            What `pack` wrote.
        origin
            The chunk's index, where known: a chunk that says it belongs elsewhere is refused.

        Raises
        ------
        ChunkError
            If the bytes are damaged, belong elsewhere, or were coded with other weights.
        """
        chunk = read_chunk(data)
        if chunk.stream_digest != self._digest:
            raise ChunkError(
                f"a chunk coded with weights {chunk.stream_digest.hex()}, decoded with {self._digest.hex()}"
            )
        if origin is not None and chunk.origin is not None and chunk.origin != origin:
            raise ChunkError(f"the chunk of place {chunk.origin} stands at place {origin}")
        dtype = np.dtype(self.format.dtype).newbyteorder("<")
        if isinstance(chunk.body, NeuralBody):
            codes, symbols = entropy.decode(
                self._stream, chunk.body.words, chunk.body.escapes, self._code_grid, chunk.body.quality
            )
            (voxels,) = self.reconstruct([Coded(codes, symbols, chunk.body.quality)])
        elif chunk.kind is Kind.CONSTANT:
            if len(chunk.body) != dtype.itemsize:
                raise ChunkError("a constant chunk that does not hold one value")
            voxels = np.full(self.format.shape, np.frombuffer(chunk.body, dtype)[0], self.format.dtype)
        else:
            raw = np.empty(self.format.shape, dtype)
            if not unpack_exactly(chunk.body, raw):
                raise ChunkError("a raw chunk that does not unpack to the chunk's shape")
            return raw.astype(self.format.dtype)
        mask = unpack_mask(chunk.mask, self.format.shape) if chunk.mask else np.zeros(self.format.shape, bool)
        return keep_off_fill(voxels, mask, self.format.fill_value)

    def reconstruct(self, coded: Sequence[Coded]) -> list[Voxels]:
        """The networks' half of decoding: integers to voxels, before fill is put back."""
        return [voxels for pair in _pairs(coded) for voxels in self._reconstruct_pair(pair)]

    def _reconstruct_pair(self, pair: Sequence[Coded]) -> list[Voxels]:
        full = _doubled(pair)
        y_hat = []
        for one in full:
            step = np.exp2(-self._stream.log_gain(one.quality)).astype(np.float32)[:, None, None, None]
            y_hat.append(self._stream.means(one.codes) + one.symbols.astype(np.float32) * step)
        gains = [float(self._stream.log_gain(one.quality).mean()) for one in full]
        codes = torch.from_numpy(np.stack([one.codes for one in full]).astype(np.int64)).to(self._device)
        with torch.inference_mode():
            entries = [book[code] for book, code in zip(self._codebook, codes.unbind(1), strict=True)]
            prior = torch.stack(entries).sum(dim=0).permute(0, 4, 1, 2, 3)
            latents = _channels_last(torch.from_numpy(np.stack(y_hat)).to(self._device))
            x_hat = self._synthesis(latents, prior, torch.tensor(gains, device=self._device))
            values = (x_hat[:, 0] * self.format.scale + self.format.offset).cpu().numpy()
        return [_to_dtype(one, self.format.dtype) for one in values[: len(pair)]]

    @property
    def _code_grid(self) -> Shape3:
        return triple(n // s for n, s in zip(self.format.shape, self._config.stride, strict=True))


class ChunkEncoder:
    """Encodes chunks: networks and, with `pack`, entropy coding."""

    def __init__(self, weights: Weights, chunk: ChunkFormat, *, device: str = "cpu") -> None:
        self.decoder = ChunkDecoder(weights, chunk, device=device)
        self.format = chunk
        self.stream = weights.stream
        self._config = weights.config
        self._digest = weights.stream_digest
        self._device = torch.device(device)
        self._codebook = torch.from_numpy(weights.codebook.astype(np.float32)).to(self._device)
        self._analysis = Analysis(weights.config)
        load_network(weights, "analysis", self._analysis)
        self._analysis = _ready(self._analysis, self._device)

    def latents(self, chunks: Sequence[Voxels]) -> list[Latents]:
        """Run the analysis on chunks (z, y, x), cut off by the volume's end or not."""
        return [latents for pair in _pairs(chunks) for latents in self._latents_pair(pair)]

    def _latents_pair(self, pair: Sequence[Voxels]) -> list[Latents]:
        padded = np.stack([self._padded(voxels) for voxels in _doubled(pair)])[:, None]
        mask = torch.from_numpy(fill_mask(padded, self.format.fill_value))
        # What overflows here comes out of the networks as no number, and `drafts` codes it raw.
        with np.errstate(over="ignore"):
            values = padded.astype(np.float32) - np.float32(self.format.offset)
            values /= np.float32(self.format.scale)
        with torch.inference_mode():
            x = inpaint(torch.from_numpy(values).to(self._device), mask.to(self._device))
            y, z = self._analysis(_channels_last(x))
            codes = quantise_codes(self._codebook, z).to(torch.uint8).cpu().numpy()
        return [
            Latents(one, latents - self.stream.means(one))
            for one, latents in list(zip(codes, y.cpu().numpy(), strict=True))[: len(pair)]
        ]

    def drafts(
        self, chunks: Sequence[Voxels], quality: int, origins: Sequence[Shape3 | None] | None = None
    ) -> list[Draft | None]:
        """First half of encoding chunks (z, y, x); None for one that is nothing but fill."""
        places = origins if origins is not None else [None] * len(chunks)
        found = [
            self._exact_draft(voxels, quality, origin) for voxels, origin in zip(chunks, places, strict=True)
        ]
        neural = [
            index
            for index, draft in enumerate(found)
            if draft is not None and not draft.value and draft.neural
        ]
        latents = self.latents([chunks[index] for index in neural])
        symbols = [self.symbols(one, quality) for one in latents]
        coded = [Coded(one.codes, rounded, quality) for one, rounded in zip(latents, symbols, strict=True)]
        decoded = self.decoder.reconstruct(coded)
        for index, one, rounded, voxels in zip(neural, latents, symbols, decoded, strict=True):
            draft = found[index]
            assert draft is not None
            found[index] = self._neural_draft(draft, chunks[index], one, rounded, voxels)
        return found

    def _exact_draft(self, voxels: Voxels, quality: int, origin: Shape3 | None) -> Draft | None:
        """What needs no network: fill, constants, numbers that are none; and the raw form of the rest."""
        mask = fill_mask(voxels, self.format.fill_value)
        if mask.all():
            return None
        padded = self._padded(voxels)
        packed_mask = pack_mask(fill_mask(padded, self.format.fill_value)) if mask.any() else b""
        draft = Draft(
            origin,
            packed_mask,
            b"",
            b"",
            quality,
            np.empty(0, np.uint8),
            np.empty(0, np.int16),
            ErrorSum(),
            True,
        )
        if (kept := voxels[~mask]).min() == kept.max():
            return replace(draft, value=_little_endian(kept[0]), error=ErrorSum(voxels.size), neural=False)
        raw = bytes(zstd.compress(_little_endian(padded), RAW_LEVEL))
        if not np.isfinite(kept.astype(np.float64)).all():
            return replace(draft, mask=b"", raw=raw, error=ErrorSum(voxels.size), neural=False)
        return replace(draft, raw=raw)

    def _neural_draft(
        self,
        draft: Draft,
        voxels: Voxels,
        latents: Latents,
        symbols: npt.NDArray[np.int16],
        decoded: Voxels,
    ) -> Draft:
        mask = fill_mask(voxels, self.format.fill_value)
        inside = Box((0, 0, 0), triple(iter(voxels.shape))).slices
        error = ErrorSum.between(voxels, keep_off_fill(decoded[inside], mask, self.format.fill_value))
        if not (np.isfinite(latents.centred).all() and math.isfinite(error.squared)):
            return replace(draft, mask=b"", error=ErrorSum(voxels.size), neural=False)
        # At worst a letter takes 24 bits, an escape 3 bytes more: a raw form longer than that cannot win.
        keep_raw = len(draft.raw) < 6 * symbols.size + 3 * latents.codes.size + 16
        raw = draft.raw if keep_raw else b""
        return replace(draft, raw=raw, codes=latents.codes, symbols=symbols, error=error)

    def symbols(self, latents: Latents, quality: int) -> npt.NDArray[np.int16]:
        """Round latents at a quality: int16 (latents, Z, Y, X)."""
        gain = np.exp2(self.stream.log_gain(quality))[:, None, None, None]
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = round_latents(latents.centred * gain)
            return np.clip(rounded, -LARGEST_SYMBOL, LARGEST_SYMBOL).astype(np.int16)

    def size_at(self, draft: Draft | None, latents: Latents, quality: int) -> int:
        """Bytes that a drafted chunk takes at another quality; `latents` are those of its voxels."""
        if draft is not None and draft.symbols.size:
            draft = replace(draft, quality=quality, symbols=self.symbols(latents, quality))
        return len(pack(draft, self.stream, self._digest).data)

    def encode(self, voxels: Voxels, quality: int, origin: Shape3 | None = None) -> Packed:
        """Both halves of encoding one chunk."""
        (draft,) = self.drafts([voxels], quality, [origin])
        return pack(draft, self.stream, self._digest)

    def _padded(self, voxels: Voxels) -> Voxels:
        if any(n > c for n, c in zip(voxels.shape, self.format.shape, strict=True)):
            raise SettingsError(f"a chunk of shape {voxels.shape} is larger than {self.format.shape}")
        missing = [(0, c - n) for n, c in zip(voxels.shape, self.format.shape, strict=True)]
        return np.pad(voxels, missing, mode="edge")


def pack(draft: Draft | None, stream: entropy.StreamTables, stream_digest: str) -> Packed:
    """Second half of encoding: code a draft and choose the shortest kind. Needs no network."""
    if draft is None:
        return Packed(b"", Kind.CONSTANT, ErrorSum())
    digest = bytes.fromhex(stream_digest)[:4]
    raw = write_chunk(Chunk(Kind.RAW, digest, draft.origin, b"", draft.raw)) if draft.raw else b""
    if draft.value:
        data = write_chunk(Chunk(Kind.CONSTANT, digest, draft.origin, draft.mask, draft.value))
        return Packed(data, Kind.CONSTANT, draft.error)
    if draft.symbols.size:
        words, escapes = entropy.encode(stream, draft.codes, draft.symbols, draft.quality)
        body = NeuralBody(draft.quality, words, escapes)
        data = write_chunk(Chunk(Kind.NEURAL, digest, draft.origin, draft.mask, body))
        if not raw or len(data) < len(raw):
            return Packed(data, Kind.NEURAL, draft.error)
    return Packed(raw, Kind.RAW, ErrorSum(draft.error.voxels))


def round_latents(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The encoder's rounding of scaled latents to whole numbers; see `ucray.codec.rate.ROUNDING`."""
    return np.sign(values) * np.floor(np.abs(values) + np.float32(ROUNDING))


def device_for(name: str) -> str:
    """Resolve "auto" to the device at hand."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def normalisation(samples: Sequence[Voxels], fill_value: float) -> tuple[float, float]:
    """Offset and scale of a volume from samples of it: mean and standard deviation of tissue.

    Both are rounded to six significant digits, so that they are written and read back exactly.
    """
    kept = np.concatenate([s[~fill_mask(s, fill_value)].astype(np.float64).reshape(-1) for s in samples])
    kept = kept[np.isfinite(kept)]
    if kept.size == 0 or kept.max() == kept.min():
        return float(kept[0]) if kept.size else 0.0, 1.0
    return float(f"{kept.mean():.6g}"), float(f"{kept.std():.6g}")


def _to_dtype(values: npt.NDArray[np.float32], dtype: str) -> Voxels:
    if np.issubdtype(np.dtype(dtype), np.floating):
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


def _little_endian(voxels: Voxels | np.generic) -> bytes:
    array = np.ascontiguousarray(voxels)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _pairs(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), PAIR):
        yield items[start : start + PAIR]


def _doubled(pair: Sequence[Item]) -> list[Item]:
    return [pair[min(place, len(pair) - 1)] for place in range(PAIR)]


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _ready(network: Network, device: torch.device) -> Network:
    network.requires_grad_(False)
    return network.eval().to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]

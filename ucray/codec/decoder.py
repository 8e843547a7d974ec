"""Bytes to chunks of voxels: parsing, the synthesis network, constants, raw chunks, fill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ucray.codec.bitstream import BoundedBody, Kind, NeuralBody, read_chunk
from ucray.codec.chunk import ChunkFormat, Voxels
from ucray.codec.context import FEATURE_UNITS
from ucray.codec.fill import Mask, keep_off_fill, unpack_mask
from ucray.codec.frames import unpack_exactly
from ucray.codec.linear import LinearSynthesis
from ucray.codec.network import stored_synthesis
from ucray.codec.residual import apply_residual, decode_residual
from ucray.codec.stream import CodedLatents
from ucray.codec.threads import one_thread
from ucray.codec.weights import Weights
from ucray.errors import ChunkError, WeightsError
from ucray.grid import Shape3, triple

Network = TypeVar("Network", bound=torch.nn.Module)
Item = TypeVar("Item")

GROUP = 8
"""Chunks that are parsed before any of them is rebuilt; a bound on memory."""

GPU_BATCH = 16
"""Chunks that go through the networks together on a GPU, always as many: a short batch is filled up.

Which kernels a GPU's libraries choose depends on the batch, and with them the rounding. On a CPU chunks
go through one by one.
"""


class ChunkDecoder:
    """Decodes chunks with one network, the student unless told otherwise."""

    def __init__(
        self, weights: Weights, chunk: ChunkFormat, *, part: str = "student", device: str = "cpu"
    ) -> None:
        chunk.check_stride(weights.config.stride)
        self.format = chunk
        self._config = weights.config
        self._stream = weights.stream
        self._digest = bytes.fromhex(weights.stream_digest)
        self._device = torch.device(device)
        bounded = part == "student" and weights.part("reference")
        if not (bounded or weights.part(part)):
            raise WeightsError(f"the weights hold no {part}; decoder weights cannot do more than decode")
        self._weights = weights
        self._part = part

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
        return self.decode_many([data], [origin])[0]

    def decode_many(
        self, data: Sequence[bytes], origins: Sequence[Shape3 | None] | None = None
    ) -> list[Voxels]:
        """Voxels of several chunks; as `decode` otherwise."""
        places = origins if origins is not None else [None] * len(data)
        wanted = list(zip(data, places, strict=True))
        with one_thread(self._device):
            return [
                voxels
                for start in range(0, len(wanted), GROUP)
                for voxels in self._group(wanted[start : start + GROUP])
            ]

    def _group(self, wanted: Sequence[tuple[bytes, Shape3 | None]]) -> Iterator[Voxels]:
        parsed = [self._parsed(*one) for one in wanted]
        rebuilt = iter(self.reconstruct([one for one, _ in parsed if isinstance(one, CodedLatents)]))
        for one, mask in parsed:
            if isinstance(one, CodedLatents):
                yield keep_off_fill(next(rebuilt), mask, self.format.fill_value)
            else:
                yield one

    def _parsed(self, data: bytes, origin: Shape3 | None) -> tuple[CodedLatents | Voxels, Mask]:
        """Latents for the networks, or voxels where none are needed; and the mask of fill voxels."""
        chunk = read_chunk(data, self._digest)
        if origin is not None and chunk.origin is not None and chunk.origin != origin:
            raise ChunkError(f"the chunk of place {chunk.origin} stands at place {origin}")
        if chunk.mask and not self.format.has_fill:
            raise ChunkError("a chunk with a mask of fill voxels in an archive that has none")
        shape, body = self.format.shape, chunk.body
        mask = unpack_mask(chunk.mask, shape) if chunk.mask else np.zeros(shape, bool)
        if isinstance(body, NeuralBody):
            return self._coded(body), mask
        if isinstance(body, BoundedBody):
            return self._bounded(body, mask), mask
        dtype = np.dtype(self.format.dtype).newbyteorder("<")
        if chunk.kind is Kind.CONSTANT:
            if len(body) != dtype.itemsize:
                raise ChunkError("a constant chunk that does not hold one value")
            voxels: Voxels = np.full(shape, np.frombuffer(body, dtype)[0], self.format.dtype)
            return keep_off_fill(voxels, mask, self.format.fill_value), mask
        raw = np.empty(shape, dtype)
        if not unpack_exactly(body, raw):
            raise ChunkError("a raw chunk that does not unpack to the chunk's shape")
        return raw.astype(self.format.dtype), mask

    def _coded(self, body: NeuralBody) -> CodedLatents:
        return self._stream.decode(body.words, body.escapes, self._code_grid, body.quality, body.passes)

    def _bounded(self, body: BoundedBody, mask: Mask) -> Voxels:
        reference = self._weights.reference
        cells = triple(n // c for n, c in zip(self.format.shape, reference.cell, strict=True))
        counts = math.prod(cells), math.prod(reference.cell)
        residual = decode_residual(body.residual, self._stream.frequencies, *counts)
        predicted = reference.predict(self._coded(body.coarse).latents, self.format)
        voxels = apply_residual(predicted, residual, self.format.dtype, reference.cell)
        # No other voxel is moved off the fill value here: that would break the bound.
        if mask.any():
            voxels[mask] = self.format.fill_value
        return voxels

    @cached_property
    def synthesis(self) -> LinearSynthesis:
        """The network, loaded when the first chunk needs it: bounded archives hold none."""
        return ready(stored_synthesis(self._weights, self._part), self._device)

    def reconstruct(self, coded: Sequence[CodedLatents]) -> list[Voxels]:
        """The networks' half of decoding: integers to voxels, before fill is put back."""
        with one_thread(self._device):
            return [
                voxels for batch in batches(coded, self._device) for voxels in self._reconstructed(*batch)
            ]

    def _reconstructed(self, full: Sequence[CodedLatents], wanted: int) -> list[Voxels]:
        context = self._stream.context
        # Torch's own memory, as it lies at even places: where numbers lie, products may round otherwise.
        whole = torch.stack([torch.from_numpy(one.latents) for one in full])
        prior = np.stack([context.vectors(one.codes).astype(np.float32) for one in full]) / FEATURE_UNITS
        quality = torch.tensor([float(one.quality) for one in full], device=self._device)
        with torch.inference_mode():
            y_hat = whole.to(self._device, torch.float32).mul_(
                torch.from_numpy(context.unit).to(self._device)
            )
            latents = y_hat.permute(0, 4, 1, 2, 3)
            side = torch.from_numpy(prior.astype(np.float32)).to(self._device).permute(0, 4, 1, 2, 3)
            x_hat = self.synthesis(latents, side, quality)
            values = x_hat[:, 0].mul_(self.format.scale).add_(self.format.offset).cpu().numpy()
        return [_to_dtype(one, self.format.dtype) for one in values[:wanted]]

    @property
    def _code_grid(self) -> Shape3:
        return triple(n // s for n, s in zip(self.format.shape, self._config.stride, strict=True))


def device_for(name: str) -> str:
    """Resolve "auto" to the device at hand."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def batches(items: Sequence[Item], device: torch.device) -> Iterator[tuple[Sequence[Item], int]]:
    """Batches for the networks on a device, and how many of each are wanted: the rest fills up the last."""
    size = GPU_BATCH if device.type == "cuda" else 1
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        yield [*batch, *[batch[-1]] * (size - len(batch))], len(batch)


def _to_dtype(values: npt.NDArray[np.float32], dtype: str) -> Voxels:
    """Values, which are rounded where they are, as voxels."""
    if np.issubdtype(np.dtype(dtype), np.floating):
        return values.astype(dtype)
    if not np.isfinite(values).all():
        raise ChunkError("a chunk that decodes to no numbers: its weights or its scale are damaged")
    limits = np.iinfo(dtype)
    np.rint(values, out=values)
    return np.clip(values, limits.min, limits.max, out=values).astype(dtype)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The layout in which convolutions on a CPU are fastest."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def ready(network: Network, device: torch.device) -> Network:
    """A network for inference alone, on its device."""
    network.requires_grad_(False)
    return network.eval().to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]

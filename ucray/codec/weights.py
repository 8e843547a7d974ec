"""Weights: the numbers of the networks and of the stream, with a digest; one safetensors file.

Names of tensors start with the part they belong to: `stream.` (codebook and integer tables, needed
by everyone), `analysis.` (to encode), `teacher.` and `student.` (to decode), `reference.` (to decode
within a bound). Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ucray.codec.context import (
    LARGEST_FIRST_SUM,
    LARGEST_STEP,
    TABLES,
    ContextModel,
    Layer,
)
from ucray.codec.frequencies import TOTAL, FrequencyTables
from ucray.codec.passes import Pass, coding_passes
from ucray.codec.residual import Reference
from ucray.codec.stream import StreamModel
from ucray.codec.trellis import SPACING
from ucray.codec.unlapping import STAGES, Blocks, Unlapping, block_sizes
from ucray.config import QUALITIES, CodecConfig
from ucray.errors import WeightsError

FORMAT = "ucray-weights"
VERSIONS = (1, 2, 3, 4, 5, 6)
"""Of the format, which is the last part of the key that FORMAT begins, and the zarr codec's: FORMAT.md."""

DECODER_PARTS = ("stream", "student")
BOUNDED_PARTS = ("stream", "reference")
LAYERS = ("first", "middle", "last")

SCALE = ":scale"
"""Behind the name of an int8 tensor: what one unit is worth, for each index of its first axis."""

SMALLEST_SHARE, LARGEST_SHARE = 2.0**-24, 2.0**10
"""Of a latent's unit in its deviation: products of whole numbers then stay within 63 bits."""

LARGEST_SHIFT = 32

LARGEST_LATENTS = 1 << 13
"""Of a cell: sums over all of them then stay below 2^53."""

FEATURES_PER_VOXEL = 64
"""At most, in any network: what a decoder computes is bounded by a chunk's voxels too."""

LATENTS_PER_VOXEL = 4
"""At most, so that what a chunk unpacks to is bounded by its voxels."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one codec.

    Parameters
    ----------
    config
        Shapes of networks and stream.
    tensors
        Arrays by name; networks are float16, the matrices of a synthesis int8 with a float32 scale a row.
    training
        How they were made (steps, seed, source, ...), for people; JSON values.
    """

    config: CodecConfig
    tensors: Mapping[str, Array]
    training: Mapping[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __getstate__(self) -> dict[str, Any]:
        # What was built from the tensors is built again: the coder's tables do not travel.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration and tensors, whatever file they lie in; 64 hex digits."""
        return _digest(self.config, self.tensors)

    @cached_property
    def stream_digest(self) -> str:
        """SHA-256 over what fixes the bytes of a chunk: configuration and `stream` tensors."""
        return _digest(self.config, self.part("stream", keep_prefix=True))

    @cached_property
    def stream(self) -> StreamModel:
        """The whole numbers that fix how a stream is parsed."""
        arrays = self.part("stream")
        config = self.config
        networks = tuple(
            tuple(_layer(arrays, number, layer) for layer in LAYERS) for number in range(len(_passes(config)))
        )
        names = ("codebook", "unit", "step", "gain", "base", "deviation")
        context = ContextModel(
            config.groups,
            config.checkered,
            config.code_stride,
            **{name: arrays[name] for name in names},  # type: ignore[arg-type]
            networks=networks,  # type: ignore[arg-type]
            spacing=1 if config.first_dependent is None else SPACING,
            interlaced=config.interlaced,
        )
        tables = ("reach", "frequencies", "code_frequencies")
        frequencies = FrequencyTables(
            **{name: arrays[name] for name in tables},  # type: ignore[arg-type]
            states=config.trellis_states,
        )
        return StreamModel(context, frequencies)

    @cached_property
    def reference(self) -> Reference:
        """The linear reconstruction in whole numbers; raises WeightsError if there is none."""
        arrays = self.part("reference")
        weight, shift = arrays.get("weight"), arrays.get("shift")
        cell = self.config.latent_cell
        shape = (self.config.latents, cell[0] * cell[1] * cell[2])
        if weight is None or shift is None:
            raise WeightsError("the weights hold no reference; no error can be bounded with them")
        if weight.dtype != "int16" or weight.shape != shape or shift.dtype != "uint8" or shift.shape != (1,):
            raise WeightsError("the weights are damaged: their reference is misshapen")
        axes = {
            axis: [_blocks(arrays, axis, size, stage) for stage in reversed(range(STAGES))]
            for axis, size in zip("zyx", cell, strict=True)
            if size > 1
        }
        return Reference(weight, int(shift[0]), cell, Unlapping(cell, axes))  # type: ignore[arg-type]

    def part(self, name: str, *, keep_prefix: bool = False) -> dict[str, Array]:
        """Tensors of one part; empty if these weights do not hold it."""
        prefix = name + "."
        return {
            key if keep_prefix else key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def network(self, part: str) -> dict[str, npt.NDArray[np.float32]]:
        """Tensors of a network in float32; empty if these weights do not hold it.

        Raises
        ------
        WeightsError
            If a scale does not fit its tensor.
        """
        arrays = self.part(part)
        found = {}
        for name, array in arrays.items():
            if name.endswith(SCALE):
                continue
            values = array.astype(np.float32)
            if array.dtype == np.int8:
                scale = arrays.get(name + SCALE)
                if scale is None or scale.shape != array.shape[:1] or scale.dtype != np.float32:
                    raise WeightsError(f"the weights are damaged: {part}.{name} has no scale that fits")
                values = values * scale.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))
            found[name] = values
        return found

    def decoder(self, *, bounded: bool = False) -> Weights:
        """What an archive must hold to be decoded, nothing of the training.

        The stream, and the student or, where every voxel's error is bounded, the reference.
        """
        kept: dict[str, Array] = {}
        for part in BOUNDED_PARTS if bounded else DECODER_PARTS:
            kept |= self.part(part, keep_prefix=True)
        return Weights(self.config, kept)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        header = {"config": self.config.to_json(), "training": dict(self.training)}
        name = f"{FORMAT}-{self.config.version}"
        metadata = {name: json.dumps(header, sort_keys=True, separators=(",", ":"))}
        return bytes(save({k: np.ascontiguousarray(v) for k, v in self.tensors.items()}, metadata=metadata))

    @classmethod
    def from_bytes(cls, data: bytes) -> Weights:
        """Parse a safetensors file.

        Raises
        ------
        WeightsError
            If it is damaged, or no ucray weights, or of a format this version does not know.
        """
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        except (SafetensorError, ValueError, KeyError, RecursionError):
            raise WeightsError("the weights are damaged: not a whole safetensors file") from None
        known = [name for version in VERSIONS if (name := f"{FORMAT}-{version}") in metadata]
        if not known:
            wanted = " or ".join(f"{FORMAT}-{version}" for version in VERSIONS)
            raise WeightsError(f"the file holds no ucray weights of format {wanted}")
        try:
            header = json.loads(metadata[known[0]])
            weights = cls(CodecConfig.parse(header["config"]), tensors, dict(header["training"]))
            if known[0] != f"{FORMAT}-{weights.config.version}":
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise WeightsError("the weights are damaged: their configuration does not parse") from None
        weights.check_stream()
        return weights

    def check_stream(self) -> None:
        """Refuse integer tables whose shapes or sums could lead a decoder astray."""
        config = self.config
        if config.latents > min(LARGEST_LATENTS, LATENTS_PER_VOXEL * math.prod(config.latent_cell)):
            raise WeightsError(f"the weights are damaged: {config.latents} latents a cell")
        widest = max(config.code_width, config.context_width)
        if widest > FEATURES_PER_VOXEL * math.prod(config.latent_cell):
            raise WeightsError(f"the weights are damaged: more than {FEATURES_PER_VOXEL} features a voxel")
        arrays = self.part("stream")
        for name, (shape, dtype) in _expected(config).items():
            array = arrays.get(name)
            if array is None or array.dtype != dtype or (shape is not None and array.shape != shape):
                raise WeightsError(f"the weights are damaged: table {name!r} is missing or misshapen")
        context, stream = self.stream.context, self.stream.frequencies
        tables = 2 * TABLES - (config.first_dependent or TABLES)
        if stream.reach.shape != (tables,) or stream.frequencies.ndim != 1:
            raise WeightsError("the weights are damaged: frequency tables are missing or misshapen")
        scales = np.concatenate([context.unit, context.deviation])
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise WeightsError("the weights are damaged: units of the latents are no positive numbers")
        share = context.unit.astype(np.float64) / context.deviation.astype(np.float64)
        if not (share.min() > SMALLEST_SHARE and share.max() < LARGEST_SHARE):
            raise WeightsError("the weights are damaged: units of the latents are out of range")
        if (context.step < 1).any() or (context.step > LARGEST_STEP).any():
            raise WeightsError("the weights are damaged: a quantisation step is out of range")
        networks = context.networks
        shifts = [layer.shift for network in networks for layer in network]
        if max(shifts) > LARGEST_SHIFT or max(n[0].largest_sum for n in networks) >= LARGEST_FIRST_SUM:
            raise WeightsError("the weights are damaged: a context network is out of range")
        lengths = 2 * stream.reach.astype(np.int64) + 2
        if lengths.min() < 6 or lengths.sum() != stream.frequencies.size:
            raise WeightsError("the weights are damaged: frequency tables do not fit their reach")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        sums = np.add.reduceat(stream.frequencies.astype(np.int64), starts)
        code_sums = stream.code_frequencies.astype(np.int64).sum(axis=1)
        positive = stream.frequencies.all() and stream.code_frequencies.all()
        if (sums != TOTAL).any() or (code_sums != TOTAL).any() or not positive:
            raise WeightsError(f"the weights are damaged: frequencies do not add up to {TOTAL}")


def stream_tensors(model: StreamModel) -> dict[str, Array]:
    """The tensors of the part `stream`, by name."""
    context, frequencies = model.context, model.frequencies
    tensors: dict[str, Array] = {
        "codebook": context.codebook,
        "unit": context.unit,
        "step": context.step,
        "gain": context.gain,
        "base": context.base,
        "deviation": context.deviation,
        "reach": frequencies.reach,
        "frequencies": frequencies.frequencies,
        "code_frequencies": frequencies.code_frequencies,
    }
    for number, network in enumerate(context.networks):
        for name, layer in zip(LAYERS, network, strict=True):
            tensors[f"context.{number}.{name}.weight"] = layer.weight
            tensors[f"context.{number}.{name}.bias"] = layer.bias
            tensors[f"context.{number}.{name}.shift"] = np.array([layer.shift], np.uint8)
    return {f"stream.{name}": array for name, array in tensors.items()}


def _layer(arrays: Mapping[str, Array], number: int, name: str) -> Layer:
    weight, bias, shift = (arrays[f"context.{number}.{name}.{part}"] for part in ("weight", "bias", "shift"))
    return Layer(weight, bias, int(shift[0]))  # type: ignore[arg-type]


def _expected(config: CodecConfig) -> dict[str, tuple[tuple[int, ...] | None, str]]:
    """Shapes and types of the part `stream`."""
    entries = (config.code_stages, config.codes)
    expected: dict[str, tuple[tuple[int, ...] | None, str]] = {
        "codebook": ((*entries, config.code_width), "int16"),
        "unit": ((config.latents,), "float32"),
        "step": ((QUALITIES, config.latents), "int32"),
        "gain": ((QUALITIES, config.latents), "int16"),
        "base": ((config.latents,), "int16"),
        "deviation": ((config.latents,), "float32"),
        "code_frequencies": (entries, "uint16"),
        "reach": (None, "int16"),
        "frequencies": (None, "uint16"),
    }
    for number, part in enumerate(_passes(config)):
        inputs, width = part.inputs(config.code_width), config.context_width
        widths = (inputs, width, width, 2 * part.channels)
        for name, here, there in zip(LAYERS, widths[:-1], widths[1:], strict=True):
            dtype = "int8" if name == LAYERS[0] else "int16"
            expected[f"context.{number}.{name}.weight"] = ((there, here), dtype)
            expected[f"context.{number}.{name}.bias"] = ((there,), "int32")
            expected[f"context.{number}.{name}.shift"] = ((1,), "uint8")
    return expected


def _passes(config: CodecConfig) -> tuple[Pass, ...]:
    return coding_passes(config.groups, config.checkered, interlaced=config.interlaced)


def _blocks(arrays: Mapping[str, Array], axis: str, cell: int, stage: int) -> Blocks:
    """Matrices of one stage of the reference's lapping."""
    found = [arrays.get(f"lapped.axes.{axis}.{stage}.{name}") for name in ("first", "inner", "last")]
    for block, size in zip(found, block_sizes(cell, stage), strict=True):
        if block is None or block.dtype != "int16" or block.shape != (size, size):
            raise WeightsError("the weights are damaged: their reference is misshapen")
    return tuple(found)  # type: ignore[return-value]


def _digest(config: CodecConfig, tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(config.to_json(), sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()

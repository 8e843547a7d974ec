"""Weights: the numbers of the networks and of the stream, with a digest; one safetensors file.

Names of tensors start with the part they belong to: `stream.` (codebook and integer tables, needed
by everyone), `analysis.` (to encode), `teacher.` and `student.` (to decode). Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ucray.codec.entropy import TOTAL, StreamTables
from ucray.config import QUALITIES, CodecConfig
from ucray.errors import WeightsError

FORMAT = "ucray-weights-1"
DECODER_PARTS = ("stream", "student")

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one codec.

    Parameters
    ----------
    config
        Shapes of networks and stream.
    tensors
        Arrays by name, float16 for networks.
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

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration and tensors, whatever file they lie in; 64 hex digits."""
        return _digest(self.config, self.tensors)

    @cached_property
    def stream_digest(self) -> str:
        """SHA-256 over what fixes the bytes of a chunk: configuration and `stream` tensors."""
        return _digest(self.config, self.part("stream", keep_prefix=True))

    @cached_property
    def stream(self) -> StreamTables:
        """The integer tables."""
        arrays = self.part("stream")
        names = [f.name for f in fields(StreamTables) if f.name != "code_stride"]
        return StreamTables(**{n: arrays[n] for n in names}, code_stride=self.config.code_stride)  # type: ignore[arg-type]

    @property
    def codebook(self) -> npt.NDArray[np.float16]:
        """Codebook entries (stages, codes, width)."""
        return self.tensors["stream.codebook"]  # type: ignore[return-value]

    def part(self, name: str, *, keep_prefix: bool = False) -> dict[str, Array]:
        """Tensors of one part; empty if these weights do not hold it."""
        prefix = name + "."
        return {
            key if keep_prefix else key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def decoder(self) -> Weights:
        """What an archive must hold to be decoded: stream and student, nothing of the training."""
        kept: dict[str, Array] = {}
        for part in DECODER_PARTS:
            kept |= self.part(part, keep_prefix=True)
        return Weights(self.config, kept)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        header = {"config": self.config.model_dump(mode="json"), "training": dict(self.training)}
        metadata = {FORMAT: json.dumps(header, sort_keys=True, separators=(",", ":"))}
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
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        except (SafetensorError, ValueError, KeyError, UnicodeDecodeError):
            raise WeightsError("the weights are damaged: not a whole safetensors file") from None
        if FORMAT not in metadata:
            raise WeightsError(f"the file holds no ucray weights of format {FORMAT}")
        try:
            header = json.loads(metadata[FORMAT])
            weights = cls(CodecConfig.model_validate(header["config"]), tensors, header["training"])
        except (ValueError, KeyError, TypeError, ValidationError):
            raise WeightsError("the weights are damaged: their configuration does not parse") from None
        weights.check_stream()
        return weights

    def check_stream(self) -> None:
        """Refuse integer tables whose shapes or sums could lead a decoder astray."""
        config = self.config
        cells = config.code_stride[0] * config.code_stride[1] * config.code_stride[2]
        entries = (config.code_stages, config.codes)
        expected: dict[str, tuple[tuple[int, ...] | None, str]] = {
            "codebook": ((*entries, config.code_width), "float16"),
            "mean": ((*entries, cells, config.latents), "int8"),
            "scale": ((*entries, cells, config.latents), "int8"),
            "mean_step": ((config.latents,), "float32"),
            "base": ((config.latents,), "int16"),
            "gain": ((QUALITIES, config.latents), "int16"),
            "code_frequencies": (entries, "uint16"),
            "reach": (None, "int16"),
            "frequencies": (None, "uint16"),
        }
        arrays = self.part("stream")
        for name, (shape, dtype) in expected.items():
            array = arrays.get(name)
            if array is None or array.dtype != dtype or (shape is not None and array.shape != shape):
                raise WeightsError(f"the weights are damaged: table {name!r} is missing or misshapen")
        stream = self.stream
        if stream.reach.ndim != 1 or stream.frequencies.ndim != 1:
            raise WeightsError("the weights are damaged: frequency tables have more than one axis")
        if not (np.isfinite(stream.mean_step).all() and np.isfinite(self.codebook).all()):
            raise WeightsError("the weights are damaged: codebook or steps of the means are no numbers")
        lengths = 2 * stream.reach.astype(np.int64) + 2
        if not 1 <= len(stream.reach) <= 256 or lengths.min() < 2 or lengths.sum() != stream.frequencies.size:
            raise WeightsError("the weights are damaged: frequency tables do not fit their reach")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        sums = np.add.reduceat(stream.frequencies.astype(np.int64), starts)
        code_sums = stream.code_frequencies.astype(np.int64).sum(axis=1)
        positive = stream.frequencies.all() and stream.code_frequencies.all()
        if (sums != TOTAL).any() or (code_sums != TOTAL).any() or not positive:
            raise WeightsError(f"the weights are damaged: frequencies do not add up to {TOTAL}")


def _digest(config: CodecConfig, tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()

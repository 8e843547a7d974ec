"""The context model in whole numbers: mean and table of every latent, from what is coded already.

A context network sees the latents coded so far, at its cell and some around it; the roots of
their sizes at its cell; and the codebook's vector and the quality. Every number in it is whole, and
every sum stays below 2^24 in the first layer, the largest, and below 2^53 in the others: so float32 and
float64 compute them exactly, in any order of summation, and a stream written on one machine parses on
every other, with the speed of a matrix product.
`ucray.codec.prior` trains the same network in floats. This module imports no torch; FORMAT.md is its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ucray.codec.passes import QUALITY_FEATURES, Colour, Geometry, Pass, Whole, coding_passes
from ucray.config import QUALITIES
from ucray.grid import Shape3, triple

FEATURE_UNITS = 32
"""Units of a network's inputs: of a latent's standard deviation, or of a codebook vector's one."""

HIDDEN_UNITS = 256
"""Units of what a layer gives."""

LARGEST_FEATURE = (1 << 9) - 1
LARGEST_FIRST_SUM = 1 << 24
"""Bound on a first layer's sums, which float32 holds exactly."""

LARGEST_HIDDEN = 1 << 16
LARGEST_OUTPUT = 1 << 14
LARGEST_STEP = 1 << 20
"""Units of a latent; a wider quantisation step says nothing of it."""

LARGEST_LATENT = 1 << 30

WIDE = 16
"""Bits behind the point of a factor between units."""

SCALE_UNITS = 16
"""Units of an octave in scales and gains."""

TABLE_UNITS = 2
"""Scale units from one frequency table to the next: eight tables an octave."""

TABLE_OCTAVES = (-4.5, 6.0)
"""log2 of the logistic scale of the first and the last frequency table."""

TABLES = int((TABLE_OCTAVES[1] - TABLE_OCTAVES[0]) * SCALE_UNITS / TABLE_UNITS) + 1


Codes = npt.NDArray[np.uint8]
Tables = npt.NDArray[np.uint8]
Numbers = TypeVar("Numbers", npt.NDArray[np.int64], npt.NDArray[np.float64])
Inputs = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight (outputs, inputs), bias int32 (outputs,), in units of 2**-shift.

    Weights are int8 in a network's first layer, the largest, and int16 in the others.
    """

    weight: npt.NDArray[np.int8] | npt.NDArray[np.int16]
    bias: npt.NDArray[np.int32]
    shift: int

    @cached_property
    def _matrix(self) -> Inputs | Floats:
        dtype = np.float32 if self.weight.dtype == np.int8 else np.float64
        return np.ascontiguousarray(self.weight.T.astype(dtype))

    @property
    def largest_sum(self) -> int:
        """Bound on the sums of a first layer."""
        rows = np.abs(self.weight.astype(np.int64)).sum(axis=1) * LARGEST_FEATURE
        return int((rows + np.abs(self.bias.astype(np.int64))).max())

    def __call__(self, *inputs: Inputs | Floats, gain: int = 1) -> Floats:
        """Whole outputs (cells, outputs) of whole inputs side by side; `gain` changes their units."""
        width = inputs[0].shape[1]
        products = inputs[0] @ self._matrix[:width]
        for part in inputs[1:]:
            products += part @ self._matrix[width : width + part.shape[1]]
            width += part.shape[1]
        sums = products.astype(np.float64, copy=False)
        sums += self.bias
        sums *= gain * 0.5**self.shift
        sums += 0.5
        return np.floor(sums, out=sums)


@dataclass(frozen=True)
class ContextModel:
    """All whole numbers that choose means and tables.

    Parameters
    ----------
    groups, checkered, interlaced, code_stride
        See `ucray.config.CodecConfig`.
    codebook
        int16 (stages, codes, width), in units of 1 / FEATURE_UNITS.
    unit
        float32 (latents,): what one unit of a whole latent is worth.
    step
        int32 (qualities, latents): width of a quantisation step, in units of the latent.
    gain, base
        int16 (qualities, latents) and (latents,): log2 of 1 / (spacing * step) and of a latent's scale, in
        units of 1 / SCALE_UNITS.
    deviation
        float32 (latents,): standard deviation of a latent, the measure of a network's inputs and means.
    networks
        Three layers for each pass.
    spacing
        Quantisation steps from one symbol to the next.
    """

    groups: tuple[int, ...]
    checkered: int
    code_stride: Shape3
    codebook: npt.NDArray[np.int16]
    unit: npt.NDArray[np.float32]
    step: npt.NDArray[np.int32]
    gain: npt.NDArray[np.int16]
    base: npt.NDArray[np.int16]
    deviation: npt.NDArray[np.float32]
    networks: tuple[tuple[Layer, Layer, Layer], ...]
    spacing: int = 1
    interlaced: bool = False

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        return coding_passes(self.groups, self.checkered, interlaced=self.interlaced)

    @property
    def latents(self) -> int:
        return len(self.unit)

    @cached_property
    def inward(self) -> Whole:
        """From units of a latent to those of a feature, WIDE bits behind the point: (latents,)."""
        share = self.unit.astype(np.float64) / self.deviation.astype(np.float64)
        return np.rint(share * (FEATURE_UNITS << WIDE)).astype(np.int64)

    @cached_property
    def outward(self) -> Whole:
        """From units of a layer's output to those of a latent, WIDE bits behind the point: (latents,)."""
        share = self.deviation.astype(np.float64) / self.unit.astype(np.float64)
        return np.rint(share * ((1 << WIDE) // HIDDEN_UNITS)).astype(np.int64)

    def vectors(self, codes: Codes) -> Whole:
        """Sum of the chosen codebook entries: codes (stages, z, y, x) to (z, y, x, width)."""
        total = np.zeros((*codes.shape[1:], self.codebook.shape[2]), dtype=np.int64)
        for entries, code in zip(self.codebook, codes, strict=True):
            total += entries[code]
        return total


class Walk:
    """The latents of one chunk while they are coded, pass by pass.

    `latents` are whole numbers (z, y, x, latents), zero until their pass was.
    """

    def __init__(self, model: ContextModel, codes: Codes, quality: int) -> None:
        stride = model.code_stride
        shape = triple(n * s for n, s in zip(codes.shape[1:], stride, strict=True))
        self.latents = np.zeros((*shape, model.latents), dtype=np.int64)
        self._model = model
        self._quality = quality
        side = model.vectors(codes)
        for axis, size in enumerate(stride):
            side = side.repeat(size, axis=axis)
        share = [
            (2 * FEATURE_UNITS * quality**n + (top := (QUALITIES - 1) ** n)) // (2 * top) for n in (1, 2)
        ]
        shares = np.broadcast_to(np.array(share), (math.prod(shape), QUALITY_FEATURES))
        common = np.concatenate([side.reshape(len(shares), -1), shares], axis=1)
        self._common = np.clip(common, -LARGEST_FEATURE, LARGEST_FEATURE).astype(np.float32)
        self._geometry = Geometry.of(shape)
        # On the grid with a border: a latent's value, and the root of its size.
        self._values = np.zeros((self._geometry.padded, model.latents), dtype=np.float32)
        self._roots = np.zeros((self._geometry.padded, model.latents), dtype=np.float32)

    def rows(self, part: Pass, latents: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Of latents (z, y, x, latents) those of one pass: (cells, channels)."""
        return self._coded_in(part, latents.reshape(-1, latents.shape[-1])[:, part.first : part.last])

    def cells(self, part: Pass, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Of a value for each cell (z, y, x) those of one pass: (cells, 1)."""
        return self._coded_in(part, values.reshape(-1, 1))

    def _coded_in(self, part: Pass, flat: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        return flat if part.colour is Colour.ALL else flat[self._geometry.cells[part.colour]]

    def predict(self, part: Pass) -> tuple[Whole, Tables]:
        """Mean, in units of the latents, and table of every latent of a pass: both (cells, channels)."""
        model = self._model
        first, middle, last = model.networks[model.passes.index(part)]
        geometry = self._geometry
        inputs = [self._common if part.colour is Colour.ALL else self._common[geometry.cells[part.colour]]]
        if part.known:
            around = self._values[:, : part.known][geometry.around[part.colour]]
            inputs.append(around.reshape(len(around), around.shape[1] * part.known))
            inputs.append(self._roots[:, : part.known][geometry.places[part.colour]])
        hidden = _within(first(*inputs, gain=HIDDEN_UNITS // FEATURE_UNITS), 0, LARGEST_HIDDEN)
        hidden = _within(middle(hidden), 0, LARGEST_HIDDEN)
        output = _within(last(hidden), -LARGEST_OUTPUT, LARGEST_OUTPUT).astype(np.int64)
        here = slice(part.first, part.last)
        mean = (output[:, : part.channels] * model.outward[here] + (1 << WIDE - 1)) >> WIDE
        to_scale = HIDDEN_UNITS // SCALE_UNITS
        units = (output[:, part.channels :] + to_scale // 2) // to_scale
        units += model.base[here].astype(np.int64) + model.gain[self._quality, here]
        tables = (units - int(TABLE_OCTAVES[0] * SCALE_UNITS) + TABLE_UNITS // 2) // TABLE_UNITS
        return mean, _within(tables, 0, TABLES - 1).astype(np.uint8)

    def put(self, part: Pass, mean: Whole, points: npt.NDArray[np.integer]) -> None:
        """Take in the points (cells, channels) of a pass: quantisation steps from the mean."""
        model = self._model
        here = slice(part.first, part.last)
        values = mean + points.astype(np.int64) * model.step[self._quality, here]
        values = _within(values, -LARGEST_LATENT, LARGEST_LATENT)
        self.latents.reshape(-1, model.latents)[self._geometry.cells[part.colour], here] = values
        inner = (values * model.inward[here] + (1 << WIDE - 1)) >> WIDE
        inner = _within(inner, -LARGEST_FEATURE, LARGEST_FEATURE)
        places = self._geometry.places[part.colour]
        self._values[places, here] = inner
        self._roots[places, here] = np.floor(np.sqrt(np.abs(inner) * float(FEATURE_UNITS)) + 0.5)

    def leave_out(self, part: Pass) -> None:
        """Take back the last pass that was put: its latents are zero."""
        cells = self._geometry.cells[part.colour]
        self.latents.reshape(-1, self._model.latents)[cells, part.first : part.last] = 0


def _within(values: Numbers, low: int, high: int) -> Numbers:
    """Clip in place; on arrays this small `np.clip` takes longer to look at its limits than at them."""
    np.maximum(values, low, out=values)
    return np.minimum(values, high, out=values)

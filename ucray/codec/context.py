"""The context model in whole numbers: mean and table of every latent, from what is coded already.

A context network sees the latents coded so far, at its cell and some around it; the roots of
their sizes at its cell; and the codebook's vector and the quality. Every number in it is whole, and
every sum stays below 2^24 in the first layer, the largest, and below 2^53 in the others: so float32 and
float64 compute them exactly, in any order of summation, and a stream written on one machine parses on
every other, with the speed of a matrix product.
`ucray.codec.prior` trains the same network in floats. This module imports no torch; FORMAT.md is its law.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ucray.codec.passes import Pass, Whole, coding_passes
from ucray.grid import Shape3

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
    def offsets(self) -> Floats:
        """The bias as it is summed."""
        return self.bias.astype(np.float64)

    @cached_property
    def _matrix(self) -> Inputs | Floats:
        dtype = np.float32 if self.weight.dtype == np.int8 else np.float64
        return np.ascontiguousarray(self.weight.T.astype(dtype))

    @property
    def largest_sum(self) -> int:
        """Bound on the sums of a first layer."""
        rows = np.abs(self.weight.astype(np.int64)).sum(axis=1) * LARGEST_FEATURE
        return int((rows + np.abs(self.bias.astype(np.int64))).max())

    def products(self, *inputs: Inputs | Floats) -> Inputs | Floats:
        """Whole sums (cells, outputs) of weighted inputs side by side, without the bias."""
        width = inputs[0].shape[1]
        products = inputs[0] @ self._matrix[:width]
        for part in inputs[1:]:
            products += part @ self._matrix[width : width + part.shape[1]]
            width += part.shape[1]
        return np.asarray(products)


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

"""From latents to the symbols of a stream and back: context model and frequency tables together.

Encoder and decoder walk over the latents in the same passes; in each, the context model says mean
and table of every latent from what was coded before. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ucray.codec import entropy
from ucray.codec.arithmetic import BY_ARRAYS
from ucray.codec.context import TABLES, Codes, ContextModel, Tables
from ucray.codec.entropy import SymbolReader
from ucray.codec.frequencies import FrequencyTables
from ucray.codec.kernels import compiled, compiled_where_worth_it
from ucray.codec.rate import LONG_PATH_SHARE, SLOPE
from ucray.codec.trellis import SPACING, WIDENING, Layout
from ucray.codec.walk import Walk
from ucray.errors import ChunkError
from ucray.grid import Shape3

SMALLEST = 0.5
"""Of the space between symbols: latents that are smaller say nothing of whether a pass is worth a look.

Rounded one by one they would be zero, but for a mean that says otherwise; on a path few are not.
"""

PASS_BITS = 8.0
"""What a pass has to be worth beyond its own bits: it takes a decoder's time."""


@dataclass(frozen=True)
class CodedLatents:
    """Latents as a decoder gets them: codes, whole latents int64 (z, y, x, latents), quality."""

    codes: Codes
    latents: npt.NDArray[np.int64]
    quality: int


@dataclass(frozen=True)
class Symbols:
    """What the entropy coder gets of one chunk: tables uint8 and symbols int16 of each coded pass, flat.

    Tables are those of the second quantiser where symbols are.
    """

    codes: Codes
    tables: tuple[Tables, ...]
    values: tuple[npt.NDArray[np.int16], ...]
    quality: int

    def __len__(self) -> int:
        return sum(map(len, self.values))


@dataclass(frozen=True)
class StreamModel:
    """Everything that fixes how a stream is parsed."""

    context: ContextModel
    frequencies: FrequencyTables

    def quantise(
        self,
        codes: Codes,
        latents: npt.NDArray[np.float32],
        quality: int,
        weights: npt.NDArray[np.floating] | None = None,
    ) -> tuple[Symbols, CodedLatents]:
        """Round latents (z, y, x, latents), in units of the context model, to symbols.

        `weights` (z, y, x, 1 or latents), where given, are those of the squared errors of cells, or of each
        of their latents.
        """
        kernels = compiled()
        walk = Walk(self.context, codes, quality, kernels.arithmetic)
        step = self.context.step[quality]
        tables, values, worths = [], [], []
        for part in self.context.passes[: self._last_pass(walk, latents, step)]:
            mean, table = walk.predict(part)
            uncoded, scaled = kernels.in_steps(walk.rows(part, latents), mean, step[part.first : part.last])
            heavy = np.ones(len(scaled)) if weights is None else walk.weights(part, weights).reshape(-1)
            symbols, numbers = self._rounded(scaled, table.reshape(-1), heavy)
            points, worth = kernels.points_worth(
                uncoded, scaled, heavy, self._slope, numbers, symbols, self.context.spacing
            )
            walk.put(part, mean, points.reshape(mean.shape))
            tables.append(numbers)
            values.append(symbols)
            worths.append(worth)
        # The last passes are left out where all that they say is not worth its bits and its time.
        while tables:
            if worths[-1] > self.frequencies.bits_of(tables[-1], values[-1]) + PASS_BITS:
                break
            walk.leave_out(self.context.passes[len(tables) - 1])
            del tables[-1], values[-1], worths[-1]
        return Symbols(codes, tuple(tables), tuple(values), quality), CodedLatents(
            codes, walk.latents, quality
        )

    def encode(self, symbols: Symbols) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """Words of the entropy coder, and the symbols that no table holds."""
        parts = list(zip(symbols.tables, symbols.values, strict=True))
        return entropy.encode(self.frequencies, symbols.codes, parts, self.frequencies.first_dependent)

    def decode(
        self,
        words: npt.NDArray[np.uint32],
        escapes: npt.NDArray[np.int32],
        grid: Shape3,
        quality: int,
        passes: int,
    ) -> CodedLatents:
        """Undo `encode` for a chunk of `grid` codes (z, y, x), of which the first `passes` passes are coded.

        Raises
        ------
        ChunkError
            If there are not as many passes, the words end early or are left over, or the escapes do not fit.
        """
        if passes > len(self.context.passes):
            raise ChunkError(f"a chunk of {passes} passes; the weights have {len(self.context.passes)}")
        reader = SymbolReader(self.frequencies, words, escapes)
        codes = reader.codes(grid)
        kernels = compiled_where_worth_it(0)
        walk = Walk(self.context, codes, quality, BY_ARRAYS if kernels is None else kernels.arithmetic)
        for part in self.context.passes[:passes]:
            mean, table = walk.predict(part)
            read = reader.points if self._dependent else reader.symbols
            walk.put(part, mean, read(table.reshape(-1)).reshape(table.shape))
        reader.finish()
        return CodedLatents(codes, walk.latents, quality)

    @property
    def _dependent(self) -> bool:
        return self.frequencies.first_dependent < TABLES

    def rounding_step(self, quality: int) -> npt.NDArray[np.float32]:
        """Step (latents,), in units of them, of the rounding one by one that errs about as much."""
        step: npt.NDArray[np.float32] = self.context.step[quality].astype(np.float32)
        step *= self._rounding
        return step

    @property
    def _rounding(self) -> float:
        """Quantisation steps in that step."""
        return SPACING / WIDENING if self._dependent else 1.0

    @property
    def _slope(self) -> float:
        """Squared error, in squared quantisation steps, that a bit is worth."""
        share = LONG_PATH_SHARE if self._dependent and self.frequencies.trellis.one_path else 1.0
        return share * SLOPE * self._rounding**2

    def _last_pass(self, walk: Walk, latents: npt.NDArray[np.float32], step: npt.NDArray[np.int32]) -> int:
        """How many passes there are up to the last one that is worth a look."""
        smallest = SMALLEST * self.context.spacing
        for count in range(len(self.context.passes), 0, -1):
            part = self.context.passes[count - 1]
            rows = walk.rows(part, latents)
            gain = compiled().largest_gain(rows, step[part.first : part.last], smallest, self._slope)
            if gain > self._slope * PASS_BITS:
                return count
        return 0

    def _rounded(
        self, scaled: npt.NDArray[np.float64], tables: Tables, weights: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int16], Tables]:
        """Symbols for what is coded, in quantisation steps, and their tables; all flat."""
        kernels, frequencies = compiled(), self.frequencies
        numbers, symbols = tables.copy(), np.zeros(len(tables), dtype=np.int16)
        layout = Layout.of(numbers, frequencies.first_dependent)
        alone, on_paths = layout.order[: layout.alone], layout.order[layout.alone :]
        spacing = float(self.context.spacing)
        kernels.round_alone(
            scaled, weights, self._slope, alone, numbers, frequencies.extra_bits, spacing, symbols
        )
        if self._dependent:
            trellis, shift = frequencies.trellis, TABLES - frequencies.first_dependent
            kernels.cheapest_paths(
                scaled,
                weights,
                self._slope,
                on_paths,
                numbers,
                frequencies.size_bits,
                shift,
                trellis.before,
                trellis.paths_for(len(on_paths)),
                symbols,
            )
        return symbols, numbers

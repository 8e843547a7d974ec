"""A walk over the latents of one chunk, pass by pass, as encoder and decoder take it.

In each pass the context model says mean and table of every latent from what was put before. This module
imports no torch.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ucray.codec.arithmetic import Arithmetic
from ucray.codec.context import (
    FEATURE_UNITS,
    HIDDEN_UNITS,
    LARGEST_FEATURE,
    LARGEST_HIDDEN,
    LARGEST_OUTPUT,
    Codes,
    ContextModel,
    Floats,
    Inputs,
    Layer,
    Tables,
)
from ucray.codec.passes import QUALITY_FEATURES, Colour, Geometry, Pass, Whole
from ucray.config import QUALITIES
from ucray.grid import triple


class Walk:
    """The latents of one chunk while they are coded, pass by pass.

    `latents` are whole numbers (z, y, x, latents), zero until their pass was.
    """

    def __init__(self, model: ContextModel, codes: Codes, quality: int, arithmetic: Arithmetic) -> None:
        stride = model.code_stride
        shape = triple(n * s for n, s in zip(codes.shape[1:], stride, strict=True))
        self.latents = np.zeros((*shape, model.latents), dtype=np.int64)
        self._model = model
        self._arithmetic = arithmetic
        self._step = model.step[quality].astype(np.int64)
        self._scale = model.base.astype(np.int64) + model.gain[quality]
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

    def weights(self, part: Pass, weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Of weights of cells (z, y, x, 1), or of their latents, those of one pass: (cells, channels)."""
        return self.rows(part, np.broadcast_to(weights, self.latents.shape)).astype(np.float64)

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
        hidden = self._finished(first, *inputs, gain=HIDDEN_UNITS // FEATURE_UNITS)
        output = self._finished(
            last, self._finished(middle, hidden), low=-LARGEST_OUTPUT, high=LARGEST_OUTPUT
        )
        here = slice(part.first, part.last)
        return self._arithmetic.read_off(output, model.outward[here], self._scale[here])

    def _finished(
        self,
        layer: Layer,
        *inputs: Inputs | Floats,
        gain: int = 1,
        low: int = 0,
        high: int = LARGEST_HIDDEN,
    ) -> Floats:
        """Whole outputs (cells, outputs) of a layer; `gain` changes their units."""
        factor = gain * 0.5**layer.shift
        return self._arithmetic.finish(layer.products(*inputs), layer.offsets, factor, low, high)

    def put(self, part: Pass, mean: Whole, points: npt.NDArray[np.integer]) -> None:
        """Take in the points (cells, channels) of a pass: quantisation steps from the mean."""
        here = slice(part.first, part.last)
        geometry = self._geometry
        self._arithmetic.take_in(
            mean,
            points.astype(np.int64, copy=False),
            self._step[here],
            self._model.inward[here],
            geometry.cells[part.colour],
            geometry.places[part.colour],
            self.latents.reshape(-1, self._model.latents)[:, here],
            self._values[:, here],
            self._roots[:, here],
        )

    def leave_out(self, part: Pass) -> None:
        """Take back the last pass that was put: its latents are zero."""
        cells = self._geometry.cells[part.colour]
        self.latents.reshape(-1, self._model.latents)[cells, part.first : part.last] = 0

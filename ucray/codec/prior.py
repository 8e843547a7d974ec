"""The prior on the latents while it is trained: context network, scales and quality gains, in floats.

Latents are coded group by group (Minnen & Singh 2020, "Channel-wise autoregressive entropy models")
and, in the first groups, colour by colour (the two of a checkerboard: He et al. 2021). A small network on
what is coded already, on the codebook's vectors and on the quality gives each latent a mean and a
scale. Training works on floats with a differentiable estimate of the rate; `to_integers` turns the
network into the whole numbers that alone may steer the entropy coder (`ucray.codec.context`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.codebook import spread
from ucray.codec.conditioning import KNOTS, at_quality
from ucray.codec.context import (
    FEATURE_UNITS,
    HIDDEN_UNITS,
    LARGEST_FEATURE,
    LARGEST_FIRST_SUM,
    LARGEST_STEP,
    SCALE_UNITS,
    TABLE_OCTAVES,
    ContextModel,
    Layer,
)
from ucray.codec.passes import Colour, Pass, coding_passes
from ucray.codec.rate import COARSEST_LAMBDA, FINEST_LAMBDA, LARGEST_THRESHOLD, SLOPE
from ucray.codec.trellis import SPACING, WIDENING
from ucray.config import QUALITIES, CodecConfig
from ucray.grid import Shape3, triple

Quality = TypeVar("Quality", float, Tensor)

STEP_UNITS = 64
"""Units of a whole latent in the finest quantisation step."""

LARGEST_SHIFT = 16
"""Bits behind the point of a context network's weights, at most: a bias then fits 32 bits."""

FIRST_LARGEST, LARGEST_WEIGHT = 127.0, 2047.0
"""Whole weights of a context network's first and later layers, at most: every archive holds them."""

FIRST_SUM = 0.98 * LARGEST_FIRST_SUM
"""What is left of a first layer's largest sum once its numbers are rounded."""


def lambda_of(quality: Quality) -> Quality:
    """Weight of rate against distortion at a quality, or qualities, from 0 (coarsest) to QUALITIES - 1."""
    share = quality / (QUALITIES - 1)
    found: Quality = COARSEST_LAMBDA * (FINEST_LAMBDA / COARSEST_LAMBDA) ** share
    return found


@dataclass(frozen=True)
class Coding:
    """Latents as a decoder gets them, (batch, latents, ...), and their bits (batch,)."""

    y_hat: Tensor
    bits: Tensor


class ContextPrior(nn.Module):
    """Trainable context model: one small network for each pass over the latents."""

    deviation: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self._config = config
        self.passes = coding_passes(config.groups, config.checkered, interlaced=config.interlaced)
        self.networks = nn.ModuleList(
            _network(part.inputs(config.code_width), config.context_width, 2 * part.channels)
            for part in self.passes
        )
        self.base = nn.Parameter(torch.zeros(config.latents))
        knots = torch.tensor([lambda_of(k * (QUALITIES - 1) / (KNOTS - 1)) for k in range(KNOTS)])
        # High-rate theory: a uniform quantiser of step D has slope dD/dR of D^2 ln(2) / 6.
        step = (knots * 6.0 / math.log(2.0)).sqrt()
        self.log_gain = nn.Parameter((-step.log2())[:, None].repeat(1, config.latents))
        self.register_buffer("deviation", torch.ones(config.latents))

    def gain_at(self, quality: Tensor) -> Tensor:
        """log2 gain (batch, latents) at qualities (batch,) from 0 to QUALITIES - 1."""
        return at_quality(self.log_gain, quality)

    def start(self, deviation: Tensor, first: int = 0) -> None:
        """Start latents from the `first` on, whose standard deviations (latents - first,) are known."""
        # A logistic of scale s has a standard deviation of s * pi / sqrt(3).
        with torch.no_grad():
            self.deviation[first:].copy_(deviation)
            self.base[first:].copy_((deviation * math.sqrt(3.0) / math.pi).log2())

    def to_integers(self, entries: Tensor) -> ContextModel:
        """Round to what the stream stores, with codebook entries (stages, codes, width)."""
        with torch.no_grad():
            spacing = 1 if self._config.first_dependent is None else SPACING
            # Knots are rounded, and not what lies between: if all steps moved at once, the rate would jump.
            gain = _between_knots() @ (_in_units(self.log_gain.cpu()) - _widening(spacing > 1))
            step = torch.exp2(-gain) / spacing
            # The finest one gets STEP_UNITS units, so that rounding it to whole ones costs nothing.
            unit = step.amin(dim=0) / STEP_UNITS
            return ContextModel(
                groups=self._config.groups,
                checkered=self._config.checkered,
                code_stride=self._config.code_stride,
                codebook=_whole(entries.cpu() * FEATURE_UNITS, np.int16),
                unit=unit.numpy(),
                step=_whole((step / unit).clamp(max=LARGEST_STEP), np.int32),
                gain=_whole(gain * SCALE_UNITS, np.int16),
                base=_whole(self.base.cpu() * SCALE_UNITS, np.int16),
                deviation=self.deviation.cpu().numpy(),
                networks=tuple(_whole_network(network) for network in self.networks),
                spacing=spacing,
                interlaced=self._config.interlaced,
            )

    def from_integers(self, model: ContextModel) -> list[Pass]:
        """Take over what `to_integers` gave; passes of which the model has no network are given back.

        It may have fewer latents: then it has the first ones.
        """
        stored = dict(zip(model.passes, model.networks, strict=True))
        known = len(model.base)
        with torch.no_grad():
            self.base[:known].copy_(torch.from_numpy(model.base.astype(np.float32) / SCALE_UNITS))
            gain = torch.from_numpy(model.gain.astype(np.float32) / SCALE_UNITS)
            knots = torch.linalg.lstsq(_between_knots(), gain).solution
            self.log_gain[:, :known].copy_(_in_units(knots + _widening(model.spacing > 1)))
            self.deviation[:known].copy_(torch.from_numpy(model.deviation.copy()))
            for part, network in zip(self.passes, self.networks, strict=True):
                if part not in stored:
                    continue
                layers = stored[part]
                for linear, layer in zip(_linear_layers(network), layers, strict=True):
                    units = _input_units(layer is layers[0])
                    linear.weight.copy_(torch.from_numpy(layer.weight * 0.5**layer.shift))
                    linear.bias.copy_(torch.from_numpy(layer.bias * (0.5**layer.shift / units)))
        return [part for part in self.passes if part not in stored]

    def forward(self, y: Tensor, vectors: Tensor, quality: Tensor, noise: Tensor | None = None) -> Coding:
        """Code latents pass by pass, as encoder and decoder do.

        Parameters
        ----------
        y
            Latents (batch, latents, z, y, x).
        vectors
            Codebook vectors (batch, code_width, ...) on the grid of codes.
        noise
            Uniform in [-0.5, 0.5), as `y`: the rate is that of noise in place of rounding. None: the
            rate of the rounded symbols.
        """
        log_gain = self.gain_at(quality)[:, None, None, None, :]
        step = torch.exp2(-log_gain)
        values = y.permute(0, 2, 3, 4, 1)
        side = spread(vectors, y.shape[2:]).permute(0, 2, 3, 4, 1)
        share = quality[:, None] / (QUALITIES - 1)
        shares = _as_feature(torch.cat([share, share * share], dim=1))[:, None, None, None, :]
        common = torch.cat([_as_feature(side, straight=True), shares.expand(*side.shape[:4], -1)], dim=-1)
        known: list[Tensor] = []
        decoded: list[Tensor] = []
        bits = torch.zeros(len(y), device=y.device)
        for part, network in zip(self.passes, self.networks, strict=True):
            inputs = [common]
            if known:
                seen = torch.cat(known, dim=-1)
                inputs += [*_around(seen, part.colour), seen.abs().sqrt()]
            output = network(torch.cat(inputs, dim=-1))
            here = slice(part.first, part.last)
            deviation = self.deviation[here]
            mean = output[..., : part.channels] * deviation
            log_scale = output[..., part.channels :] + self.base[here] + log_gain[..., here]
            scaled = (values[..., here] - mean) / step[..., here]
            rounded = scaled + (round_symbols(scaled.detach(), log_scale.detach()) - scaled).detach()
            sent = rounded if noise is None else scaled + noise.permute(0, 2, 3, 4, 1)[..., here]
            cost = rate_in_bits(sent, log_scale)
            found = mean + rounded * step[..., here]
            if part.colour is not Colour.ALL:
                mine = cells_of(part.colour, triple(iter(values.shape[1:4])), values.device)[..., None]
                cost, found = cost * mine, found * mine
            bits = bits + cost.sum(dim=(1, 2, 3, 4))
            if not part.colour.begins:
                found = found + decoded.pop()
                known.pop()
            decoded.append(found)
            known.append(_as_feature(found.detach() / deviation))
        return Coding(torch.cat(decoded, dim=-1).permute(0, 4, 1, 2, 3), bits)


def _as_feature(values: Tensor, *, straight: bool = False) -> Tensor:
    """Values as coding will see them: in whole units, and no more of them than a feature may have.

    A network that is trained long enough learns what lies between units and beyond their limits, and then
    codes something else than it was trained on. With `straight` gradients pass as if nothing was done.
    """
    units = (values.detach() * FEATURE_UNITS).round().clamp(-LARGEST_FEATURE, LARGEST_FEATURE)
    seen = units / FEATURE_UNITS
    return seen + (values - values.detach()) if straight else seen


@cache
def cells_of(colour: Colour, shape: Shape3, device: torch.device) -> Tensor:
    """True where a cell is of a colour: bool (z, y, x)."""
    return torch.from_numpy(colour.cells(shape)).to(device)


def _around(values: Tensor, colour: Colour) -> Iterator[Tensor]:
    """Values at each of a colour's offsets, zero beyond the chunk: each like `values` (b, z, y, x, c)."""
    reach = max(map(abs, itertools.chain(*colour.offsets)))
    padded = functional.pad(values, (0, 0, *[reach] * 6))
    z, y, x = values.shape[1:4]
    for a, b, c in colour.offsets:
        yield padded[:, reach + a :, reach + b :, reach + c :][:, :z, :y, :x]


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(width, outputs)
    network = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return network


def round_symbols(scaled: Tensor, log_scale: Tensor) -> Tensor:
    """Round to whole symbols, upwards in size only where that is worth its bits.

    Of two neighbouring symbols the one with the lower squared error + SLOPE * bits is taken.
    """
    size = scaled.abs()
    lower = size.floor()
    first = _extra_bits(log_scale, 0)
    later = _extra_bits(log_scale, 1)
    threshold = 0.5 + SLOPE / 2 * torch.where(lower > 0, later, first)
    return scaled.sign() * (lower + (size - lower > threshold.clamp(max=LARGEST_THRESHOLD)))


def rate_in_bits(values: Tensor, log_scale: Tensor) -> Tensor:
    """Bits of quantised values under a logistic prior of mean zero; same shape as `values`.

    `values` carry uniform noise in place of rounding (Balle et al. 2017, section 3), `log_scale` is
    the log2 of the logistic's scale. Scales below the finest table stay trainable upwards.
    """
    low, high = TABLE_OCTAVES
    bounded = log_scale.clamp(low, high)
    scale = torch.exp2(bounded + 0.01 * (log_scale - bounded))
    size = values.abs()
    # In the lower tail both terms are small and their difference keeps its precision.
    mass = torch.sigmoid((0.5 - size) / scale) - torch.sigmoid((-0.5 - size) / scale)
    return -torch.log2(mass.clamp_min(1e-9))


def _widening(dependent: bool) -> float:
    """Octaves by which symbols lie further apart than in training, where they are rounded one by one."""
    return math.log2(WIDENING) if dependent else 0.0


def _between_knots() -> Tensor:
    """Shares of the knots in every quality: (qualities, knots)."""
    return at_quality(torch.eye(KNOTS), torch.arange(QUALITIES).float())


def _in_units(octaves: Tensor) -> Tensor:
    return (octaves * SCALE_UNITS).round() / SCALE_UNITS


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def _whole_network(network: nn.Module) -> tuple[Layer, Layer, Layer]:
    first, middle, last = _linear_layers(network)
    return _whole_layer(first, first=True), _whole_layer(middle), _whole_layer(last)


def _whole_layer(linear: nn.Linear, *, first: bool = False) -> Layer:
    """The layer with whole weights; its sums are in units of its inputs times 2**-shift."""
    largest, dtype = (FIRST_LARGEST, np.int8) if first else (LARGEST_WEIGHT, np.int16)
    units = _input_units(first)
    room = largest / max(float(linear.weight.abs().max()), 2.0**-8)
    if first:
        sums = LARGEST_FEATURE * linear.weight.abs().sum(dim=1) + units * linear.bias.abs()
        room = min(room, FIRST_SUM / float(sums.max()))
    shift = max(0, min(LARGEST_SHIFT, math.floor(math.log2(room))))
    return Layer(
        _whole(linear.weight.cpu() * 2.0**shift, dtype),
        _whole(linear.bias.cpu() * (2.0**shift * units), np.int32),
        shift,
    )


def _input_units(first: bool) -> int:
    return FEATURE_UNITS if first else HIDDEN_UNITS


def _whole(values: Tensor, dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(np.rint(values.double().numpy()), limits.min, limits.max).astype(dtype))


def _extra_bits(log_scale: Tensor, symbol: int) -> Tensor:
    """Bits that `symbol` + 1 costs beyond `symbol`."""
    low, high = TABLE_OCTAVES
    scale = torch.exp2(-log_scale.clamp(low, high))

    def mass(n: int) -> Tensor:
        return (torch.sigmoid((0.5 - n) * scale) - torch.sigmoid((-0.5 - n) * scale)).clamp_min(1e-9)

    return torch.log2(mass(symbol) / mass(symbol + 1))

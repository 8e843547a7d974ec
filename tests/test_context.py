"""The context model: passes that cover every latent once, whole numbers that follow from a law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import TINY, build_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ucray.codec.arithmetic import BY_ARRAYS, BY_LOOPS, Arithmetic
from ucray.codec.context import (
    FEATURE_UNITS,
    LARGEST_FIRST_SUM,
    Codes,
    ContextModel,
    Layer,
)
from ucray.codec.entropy import encode
from ucray.codec.frequencies import SILENT
from ucray.codec.kernels import compiled
from ucray.codec.passes import INTERLACED, Colour, Pass, coding_passes
from ucray.codec.prior import ContextPrior
from ucray.codec.walk import Walk
from ucray.codec.weights import Weights
from ucray.config import QUALITIES
from ucray.errors import ChunkError, WeightsError
from ucray.grid import Shape3, triple

Latents = dict[tuple[int, int, int, int], int]

GRID: Shape3 = (1, 2, 1)
QUALITY = 100


def codes_of(weights: Weights, grid: Shape3, seed: int = 0) -> Codes:
    """Random codes on a grid."""
    config = weights.config
    random = np.random.default_rng(seed)
    return random.integers(0, config.codes, (config.code_stages, *grid)).astype(np.uint8)


def floor_shift(number: int, bits: int) -> int:
    """Divide by a power of two, half up."""
    return (number + (1 << bits - 1)) >> bits if bits else number


def layer_reference(layer: Layer, inputs: list[int], octaves: int = 0) -> list[int]:
    """A layer in Python's whole numbers; `octaves` finer units of what it gives."""
    sums = [
        sum(int(w) * value for w, value in zip(row, inputs, strict=True)) + int(bias)
        for row, bias in zip(layer.weight, layer.bias, strict=True)
    ]
    return [floor_shift(total, layer.shift - octaves) for total in sums]


def prediction_reference(
    model: ContextModel, part: Pass, codes: Codes, quality: int, known: Latents, cell: Shape3
) -> tuple[list[int], list[int]]:
    """Means and tables of one cell in Python's whole numbers, from the latents `known` so far."""
    place = [n // s for n, s in zip(cell, model.code_stride, strict=True)]
    inputs = [
        sum(int(model.codebook[stage, codes[(stage, *place)], width]) for stage in range(len(codes)))
        for width in range(model.codebook.shape[2])
    ]
    inputs = [max(-511, min(511, value)) for value in inputs]
    for power in (1, 2):
        inputs.append(math.floor(FEATURE_UNITS * (quality / (QUALITIES - 1)) ** power + 0.5))

    def features(a: int, b: int, c: int) -> list[int]:
        around = [known.get((cell[0] + a, cell[1] + b, cell[2] + c, n), 0) for n in range(part.known)]
        units = [floor_shift(v * int(i), 16) for v, i in zip(around, model.inward[: part.known], strict=True)]
        return [max(-511, min(511, unit)) for unit in units]

    for offset in part.colour.offsets:
        inputs += features(*offset)
    inputs += [math.floor(math.sqrt(abs(value) * 32) + 0.5) for value in features(0, 0, 0)]
    first, middle, last = model.networks[model.passes.index(part)]
    hidden = [max(0, min(1 << 16, h)) for h in layer_reference(first, inputs, 3)]
    hidden = [max(0, min(1 << 16, h)) for h in layer_reference(middle, hidden)]
    output = [max(-(1 << 14), min(1 << 14, o)) for o in layer_reference(last, hidden)]
    means, tables = [], []
    for index, channel in enumerate(range(part.first, part.last)):
        means.append(floor_shift(output[index] * int(model.outward[channel]), 16))
        units = floor_shift(output[part.channels + index], 4)
        units += int(model.base[channel]) + int(model.gain[quality, channel])
        tables.append(max(0, min(84, (units + 72 + 1) // 2)))
    return means, tables


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 6),
    st.booleans(),
    st.tuples(*[st.integers(1, 6)] * 3),
)
def test_passes_meet_every_latent_once_and_know_only_what_was_coded(
    groups: list[int], checkered: int, interlaced: bool, shape: Shape3
) -> None:
    coded = np.zeros((sum(groups), *shape), dtype=int)
    for part in coding_passes(groups, checkered, interlaced=interlaced):
        here = part.colour.cells(shape)
        # Groups before it are known at all cells, its own where it was coded: nothing else is there.
        assert (coded[: part.first] == 1).all()
        assert (coded[part.known :] == 0).all()
        assert (coded[part.first : part.last, here] == 0).all()
        coded[part.first : part.last, here] += 1
    assert (coded == 1).all()


def test_later_colours_look_where_something_was_coded() -> None:
    """Of the cells around one, by colour: those that stand in its context."""
    shape = (8, 8, 8)
    inside = (slice(2, 6),) * 3
    coded = np.zeros(shape, dtype=int)
    seen = {}
    for colour in INTERLACED:
        here = colour.cells(shape)
        around = sum(np.roll(coded, [-n for n in offset], (0, 1, 2)) for offset in colour.offsets)
        seen[colour] = set(np.asarray(around)[inside][here[inside]].tolist())
        coded[here] = 1
    assert seen[Colour.FIRST] == {0}
    assert seen[Colour.SECOND] == {6}
    assert [seen[c] for c in (Colour.LAYER_X, Colour.LAYER_Y, Colour.LAYER_Z)] == [{4}, {8}, {12}]
    assert seen[Colour.ODD] == {6}


@settings(max_examples=20)
@given(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 100, 255]),
    st.sampled_from([BY_ARRAYS, BY_LOOPS, compiled().arithmetic]),
)
def test_predictions_follow_from_whole_numbers(
    tiny_weights: Weights,
    interlaced_weights: Weights,
    interlaced: bool,
    seed: int,
    quality: int,
    arithmetic: Arithmetic,
) -> None:
    weights = interlaced_weights if interlaced else tiny_weights
    model = weights.stream.context
    codes = codes_of(weights, GRID, seed)
    random = np.random.default_rng(seed)
    walk = Walk(model, codes, quality, arithmetic)
    shape = triple(iter(walk.latents.shape[:3]))
    known: Latents = {}
    for part in model.passes:
        mean, tables = walk.predict(part)
        colour = part.colour.cells(shape)
        cells = [c for c in np.ndindex(*shape) if colour[c]]
        # Mostly small symbols; some so large that features and latents meet their limits.
        symbols = random.integers(-3, 4, mean.shape) * random.choice([1, 1, 1, 10000], mean.shape)
        assert mean.shape == tables.shape == (len(cells), part.channels)
        for row in random.integers(len(cells), size=4):
            wanted = prediction_reference(model, part, codes, quality, known, cells[row])
            assert (mean[row].tolist(), tables[row].tolist()) == wanted
        walk.put(part, mean, symbols)
        for row, cell in enumerate(cells):
            for index, channel in enumerate(range(part.first, part.last)):
                value = int(mean[row, index]) + int(symbols[row, index]) * int(model.step[quality, channel])
                known[(*cell, channel)] = value
                assert walk.latents[(*cell, channel)] == value


def summed(layer: Layer, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What a layer sums up, by arrays; loops have to give the same."""
    by_arrays, by_loops = (
        way.finish(layer.products(inputs), layer.offsets, 0.5**layer.shift, -(1 << 62), 1 << 62)
        for way in (BY_ARRAYS, BY_LOOPS)
    )
    np.testing.assert_array_equal(by_arrays, by_loops)
    return by_arrays


def test_sums_stay_exact_in_any_order(tiny_weights: Weights) -> None:
    """The largest weights and inputs that are let through, summed in two orders, agree to the unit."""
    random = np.random.default_rng(0)
    inputs = random.choice([-(1 << 16), 1 << 16, (1 << 16) - 1], (3, 1000)).astype(np.float64)
    weight = random.choice([-32768, 32767], (5, 1000)).astype(np.int16)
    layer = Layer(weight, np.full(5, (1 << 31) - 1, np.int32), 0)
    order = random.permutation(1000)
    shuffled = Layer(weight[:, order], layer.bias, 0)
    np.testing.assert_array_equal(summed(layer, inputs), summed(shuffled, inputs[:, order]))
    exact = inputs.astype(object) @ weight.T.astype(object) + (1 << 31) - 1
    np.testing.assert_array_equal(summed(layer, inputs), exact.astype(np.float64))


def test_sums_of_a_first_layer_stay_exact_in_float32(tiny_weights: Weights) -> None:
    """At the bound that weights are held to, in two orders, and refused beyond it."""
    random = np.random.default_rng(0)
    inputs = random.choice([-511, 511, 510], (3, 400)).astype(np.float32)
    weight = random.choice([-82, 81, 82], (5, 400)).astype(np.int8)
    inputs[0] = np.sign(weight[0].astype(np.float32)) * 511
    layer = Layer(weight, np.full(5, 15_000, np.int32), 0)
    assert 0.99 * LARGEST_FIRST_SUM < layer.largest_sum < LARGEST_FIRST_SUM
    order = random.permutation(400)
    shuffled = Layer(weight[:, order], layer.bias, 0)
    np.testing.assert_array_equal(summed(layer, inputs), summed(shuffled, inputs[:, order]))
    exact = inputs.astype(np.int64) @ weight.T.astype(np.int64) + 15_000
    np.testing.assert_array_equal(summed(layer, inputs), exact)
    name = "stream.context.0.first.bias"
    tensors = dict(tiny_weights.tensors)
    tensors[name] = np.full_like(tensors[name], 1 << 24)
    with pytest.raises(WeightsError, match="out of range"):
        Weights(tiny_weights.config, tensors).check_stream()


@pytest.mark.parametrize("name", ["tiny_weights", "interlaced_weights"])
def test_a_stream_decodes_to_what_was_quantised(name: str, request: pytest.FixtureRequest) -> None:
    weights: Weights = request.getfixturevalue(name)
    stream = weights.stream
    codes = codes_of(weights, (2, 2, 2))
    random = np.random.default_rng(1)
    shape = (4, 4, 4, weights.config.latents)
    spread = stream.context.deviation / stream.context.unit
    latents = (random.standard_normal(shape) * spread).astype(np.float32)
    for quality in (0, 60, 200, 255):
        symbols, quantised = stream.quantise(codes, latents, quality)
        decoded = stream.decode(*stream.encode(symbols), (2, 2, 2), quality, len(symbols.tables))
        np.testing.assert_array_equal(decoded.latents, quantised.latents)
        np.testing.assert_array_equal(decoded.codes, codes)
        step = stream.context.step[quality]
        loud = np.concatenate(symbols.tables) != SILENT
        assert loud.any()
        # A latent is rounded at worst to the far one of its two neighbours, or not coded at all. On a path
        # the two lie twice as far apart.
        worst = np.abs(latents - quantised.latents) / (step * stream.context.spacing)
        assert worst[np.nonzero(worst > 1)].size <= (~loud).sum() + latents.size - len(loud)


def test_passes_that_are_not_worth_their_bits_are_left_out(tiny_weights: Weights) -> None:
    """Silence in the last groups costs nothing; a loud last group is coded."""
    stream = tiny_weights.stream
    context = stream.context
    codes = codes_of(tiny_weights, (2, 2, 2))
    latents = np.zeros((4, 4, 4, context.latents), np.float32)
    first, last = context.passes[0], context.passes[-1]
    latents[..., : first.last] = 4 * context.deviation[: first.last] / context.unit[: first.last]
    symbols, quantised = stream.quantise(codes, latents, 200)
    coded = len(symbols.tables)
    assert 0 < coded < len(context.passes)
    assert symbols.values[-1].any()
    decoded = stream.decode(*stream.encode(symbols), (2, 2, 2), 200, coded)
    np.testing.assert_array_equal(decoded.latents, quantised.latents)

    latents[..., last.first :] = 40 * context.deviation[last.first :] / context.unit[last.first :]
    assert len(stream.quantise(codes, latents, 200)[0].tables) == len(context.passes)


def test_more_passes_than_the_weights_have_are_refused(tiny_weights: Weights) -> None:
    stream = tiny_weights.stream
    words, escapes = np.empty(0, np.uint32), np.empty(0, np.int32)
    with pytest.raises(ChunkError, match="passes"):
        stream.decode(words, escapes, (2, 2, 2), 100, len(stream.context.passes) + 1)


def test_bits_of_symbols_are_those_that_the_coder_spends(tiny_weights: Weights) -> None:
    frequencies = tiny_weights.stream.frequencies
    random = np.random.default_rng(3)
    tables = random.integers(0, 60, 40_000).astype(np.uint8)
    symbols = np.where(tables == SILENT, 0, random.geometric(0.6, tables.size) - 1).astype(np.int16)
    words, escapes = encode(frequencies, None, [(tables, symbols)])
    spent = 32 * len(words) + 16 * len(escapes)
    assert frequencies.bits_of(tables, symbols) == pytest.approx(spent, rel=0.01)


def test_a_finer_quality_comes_closer(tiny_weights: Weights) -> None:
    stream = tiny_weights.stream
    codes = codes_of(tiny_weights, (2, 2, 2))
    spread = stream.context.deviation / stream.context.unit
    random = np.random.default_rng(2)
    latents = (random.standard_normal((4, 4, 4, len(spread))) * spread).astype(np.float32)
    errors, sizes = [], []
    for quality in (20, 120, 250):
        symbols, quantised = stream.quantise(codes, latents, quality)
        errors.append(float(np.mean(((latents - quantised.latents) / spread) ** 2)))
        sizes.append(len(stream.encode(symbols)[0]))
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("interlaced", [False, True])
def test_training_sees_the_means_and_bits_of_the_whole_numbers(
    interlaced: bool, tiny_weights: Weights
) -> None:
    """The float network of training against the whole-number network of the stream."""
    config = replace(TINY, interlaced=interlaced)
    weights = build_weights(config, seed=1) if interlaced else tiny_weights
    stream = weights.stream
    prior = ContextPrior(config)
    prior.from_integers(stream.context)
    codes = codes_of(weights, (2, 2, 2))
    context = stream.context
    random = np.random.default_rng(3)
    y = random.standard_normal((4, 4, 4, config.latents)).astype(np.float32) * context.deviation
    symbols, quantised = stream.quantise(codes, y / context.unit, QUALITIES - 1)
    vectors = torch.from_numpy(context.vectors(codes).astype(np.float32) / FEATURE_UNITS)
    with torch.no_grad():
        coded = prior(
            torch.from_numpy(y).permute(3, 0, 1, 2)[None],
            vectors.permute(3, 0, 1, 2)[None],
            torch.tensor([QUALITIES - 1.0]),
        )
    found: npt.NDArray[np.float32] = coded.y_hat[0].permute(1, 2, 3, 0).numpy()
    step = context.step[-1] * context.unit
    # Means are rounded to 1/256 of a deviation, here up to a quarter of a step.
    same = np.abs(found - quantised.latents * context.unit) < 0.3 * step
    assert same.mean() > 0.9
    # Tables come in eighths of an octave, and their frequencies were counted on other latents.
    bits = 32 * len(stream.encode(symbols)[0])
    assert float(coded.bits) == pytest.approx(bits, rel=0.15)

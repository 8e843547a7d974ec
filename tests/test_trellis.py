"""Dependent quantisation: the law of the paths, the encoder's best path, weights of version 3."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import TINY, TINY_DEPENDENT, SmoothVolume, build_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace
from test_entropy import rans_words

from ucray.cluster.train import trained_config
from ucray.codec import entropy
from ucray.codec.chunk import ChunkFormat
from ucray.codec.context import TABLES, Tables
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.entropy import SymbolReader
from ucray.codec.frequencies import SILENT, FrequencyTables, logistic_weights, to_frequencies
from ucray.codec.kernels import compiled
from ucray.codec.prior import ContextPrior
from ucray.codec.rate import SLOPE
from ucray.codec.trellis import FEWEST_PATHS, SPACING, WIDENING, Layout, trellis_of
from ucray.codec.weights import Weights
from ucray.config import CodecConfig, TrellisStates
from ucray.errors import ChunkError, SettingsError, WeightsError
from ucray.settings import TrainingConfig
from ucray.training.distill import Trainer

FIRST = 18
SHIFT = TABLES - FIRST

Symbols = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]


def build_frequencies(first: int, states: TrellisStates = 8) -> FrequencyTables:
    """Logistic tables, of both quantisers from `first` on; no codes."""
    logistic = logistic_weights(first)
    return FrequencyTables(
        reach=np.array([(len(w) - 2) // 2 for w in logistic], np.int16),
        frequencies=np.concatenate([to_frequencies(w) for w in logistic]),
        code_frequencies=np.empty((0, 0), np.uint16),
        states=states,
    )


SIZES: tuple[TrellisStates, ...] = get_args(TrellisStates)
FREQUENCIES = {states: build_frequencies(FIRST, states) for states in SIZES}
sizes = pytest.mark.parametrize("states", SIZES)


def order_reference(tables: Tables) -> list[int]:
    """Places of coded symbols: by table, then place."""
    return sorted((n for n in range(len(tables)) if tables[n] != SILENT), key=lambda n: (tables[n], n))


def next_reference(state: int, symbol: int, states: int) -> int:
    """FORMAT.md's law."""
    if states == 8:
        return (2 * state + (symbol + bin(state).count("1")) % 2) % 8
    return state // 2 ^ (166 if state % 2 else 0) ^ (121 if symbol % 2 else 0)


def quantisers_reference(tables: Tables, symbols: Symbols, states: int) -> list[int]:
    """0 or 1 for each symbol: FORMAT.md's law, one symbol after the other."""
    found = [0] * len(tables)
    on_paths = [place for place in order_reference(tables) if tables[place] >= FIRST]
    paths = max(8, -(-len(on_paths) // 128)) if states == 8 else 1
    at = [0] * paths
    for number, place in enumerate(on_paths):
        state = at[number % paths]
        found[place] = state % 2
        at[number % paths] = next_reference(state, int(symbols[place]), states)
    return found


def numbered(tables: Tables, symbols: Symbols, states: int) -> Tables:
    """Tables with those of the second quantiser for its symbols."""
    quantisers = np.array(quantisers_reference(tables, symbols, states), np.uint8)
    numbers: Tables = tables + np.uint8(SHIFT) * quantisers
    return numbers


# The widest table reaches to 384.
some_symbols = st.integers(-3, 3) | st.integers(-32767, 32767)


@st.composite
def some_pass(draw: st.DrawFn) -> tuple[Tables, Symbols]:
    """Any tables and symbols; the silent table has zeros alone."""
    length = draw(st.integers(0, 60))
    tables = draw(arrays(np.uint8, length, elements=st.integers(0, TABLES - 1)))
    symbols = draw(arrays(np.int32, length, elements=some_symbols))
    return tables, symbols * (tables != SILENT)


WAYS = {"one by one": lambda symbols: None, "compiled": lambda symbols: compiled()}
"""A reader's two ways along the paths."""


@contextmanager
def reading(way: str) -> Iterator[None]:
    """Symbols are read in that way, however many there are."""
    with mock.patch.object(entropy, "compiled_where_worth_it", WAYS[way]):
        yield


@sizes
@pytest.mark.parametrize("way", WAYS)
@given(parts=st.lists(some_pass(), max_size=3))
def test_levels_follow_from_the_law(
    states: TrellisStates, way: str, parts: list[tuple[Tables, Symbols]]
) -> None:
    coded = [(numbered(*part, states), part[1]) for part in parts]
    reader = SymbolReader(FREQUENCIES[states], *entropy.encode(FREQUENCIES[states], None, coded, FIRST))
    for (tables, symbols), (numbers, _) in zip(parts, coded, strict=True):
        with reading(way):
            levels = reader.points(tables)
        for place, symbol in enumerate(symbols.tolist()):
            nearer = (symbol > 0) - (symbol < 0) if numbers[place] >= TABLES else 0
            assert levels[place] == 2 * symbol - nearer
    reader.finish()


def points_or_refusal(
    states: TrellisStates, way: str, words: Words, escapes: Symbols, passes: list[Tables]
) -> object:
    """What a reader finds in words that may be damaged, down to the last of them."""
    try:
        reader = SymbolReader(FREQUENCIES[states], words, escapes)
        with reading(way):
            found = [reader.points(tables).tolist() for tables in passes]
        reader.finish()
    except ChunkError as error:
        return str(error)
    return found


@sizes
@given(
    words=arrays(np.uint32, st.integers(0, 12), elements=st.integers(0, 2**32 - 1) | st.integers(0, 3)),
    escapes=arrays(np.int32, st.integers(0, 3), elements=st.integers(-(2**31), 2**31 - 1)),
    passes=st.lists(arrays(np.uint8, st.integers(0, 40), elements=st.integers(0, TABLES - 1)), max_size=3),
)
def test_both_ways_read_the_same_in_any_words(
    states: TrellisStates, words: Words, escapes: Symbols, passes: list[Tables]
) -> None:
    one, other = (points_or_refusal(states, way, words, escapes, passes) for way in WAYS)
    assert one == other


@settings(max_examples=25)
@given(st.lists(some_pass(), max_size=3))
def test_words_follow_from_whole_numbers(parts: list[tuple[Tables, Symbols]]) -> None:
    frequencies = FREQUENCIES[8]
    coded = [(numbered(*part, 8), part[1]) for part in parts]
    letters = []
    for (tables, symbols), (numbers, _) in zip(parts, coded, strict=True):
        for place in order_reference(tables):
            reach, symbol = int(frequencies.reach[numbers[place]]), int(symbols[place])
            letter = symbol + reach if abs(symbol) <= reach else 2 * reach + 1
            letters.append((letter, frequencies.tables[numbers[place]].tolist()))
    words, _ = entropy.encode(frequencies, None, coded, FIRST)
    assert words.tolist() == rans_words(letters)


@pytest.mark.parametrize("way", WAYS)
def test_missing_escapes_on_a_path_are_refused(way: str) -> None:
    tables = np.full(40, 30, np.uint8)
    symbols = np.zeros(40, np.int32)
    symbols[[3, 20]] = 30000, -30000
    coded = [(numbered(tables, symbols, 8), symbols)]
    words, escapes = entropy.encode(FREQUENCIES[8], None, coded, FIRST)
    assert escapes.tolist() == [30000, -30000]
    with reading(way), pytest.raises(ChunkError, match="do not fill"):
        SymbolReader(FREQUENCIES[8], words, escapes[:1]).points(tables)


@pytest.mark.parametrize("missing", [False, True])
def test_a_reader_loads_the_loops_once_they_are_worth_it(missing: bool) -> None:
    """And goes on without, where numba is not installed; a process of its own, as others have them loaded."""
    code = f"""
import sys
if {missing}:
    sys.modules["numba"] = None
from ucray.codec.kernels import WORTH_LOADING, compiled_where_worth_it
assert compiled_where_worth_it(WORTH_LOADING - 1) is None
assert compiled_where_worth_it(1) is None
assert {missing} or "numba" not in sys.modules
assert (compiled_where_worth_it(1) is None) is {missing}
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@sizes
def test_states_form_a_trellis(states: TrellisStates) -> None:
    """To each lead an even symbol from one state and an odd one from another, both of one quantiser."""
    trellis = trellis_of(states)
    for state in range(states):
        for symbol in (0, 1):
            assert trellis.following[symbol, state] == next_reference(state, symbol, states)
            assert trellis.following[symbol, trellis.before[symbol, state]] == state
        one, other = trellis.before[:, state]
        assert one != other
        assert one % 2 == other % 2


def test_tables_of_the_second_quantiser_hold_the_mass_about_its_points() -> None:
    tables = logistic_weights(FIRST)
    assert len(tables) == TABLES + SHIFT
    for table in (FIRST, 40, TABLES - 1):
        weights, scale = tables[table + SHIFT], 2.0 ** (-4.5 + table / 8)
        reach = (len(weights) - 2) // 2
        # Its points are 0, 1/2, 3/2, ...: half way lie 1/4, 1, 2, ...
        for symbol, (low, high) in {0: (-0.25, 0.25), 1: (0.25, 1.0), 2: (1.0, 2.0)}.items():
            mass = 1.0 / (1.0 + np.exp(-high / scale)) - 1.0 / (1.0 + np.exp(-low / scale))
            for sign in (-1, 1):
                assert weights[reach + sign * symbol] == pytest.approx(mass, abs=1e-15)


def layout_of(tables: Tables) -> Layout:
    return Layout.of(tables, FIRST)


def best_symbols(
    frequencies: FrequencyTables, tables: Tables, scaled: Floats, weight: Floats, slope: float
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """Symbols on all paths of a pass, and which are of the second quantiser; all in the order of cells."""
    used, symbols = tables.copy(), np.zeros(len(tables), np.int16)
    layout, trellis = layout_of(tables), frequencies.trellis
    paths, places = trellis.paths_for(len(layout.order)), layout.order
    compiled().cheapest_paths(
        scaled, weight, slope, places, used, frequencies.size_bits, SHIFT, trellis.before, paths, symbols
    )
    return symbols, used >= TABLES


@sizes
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_path_that_is_found_is_the_cheapest(states: TrellisStates, seed: int) -> None:
    """Against all symbols from -4 to 4 on paths of four symbols."""
    random = np.random.default_rng(seed)
    frequencies = FREQUENCIES[states]
    paths = FEWEST_PATHS if states == 8 else 1
    tables = random.integers(FIRST, 48, 4 * paths).astype(np.uint8)
    layout = layout_of(tables)
    used, order = layout.tables, layout.order
    scaled = random.uniform(-6.0, 6.0, len(tables))
    weight, slope = random.uniform(0.2, 5.0, len(tables)), random.uniform(0.0, 0.6)
    symbols, second = best_symbols(frequencies, tables, scaled, weight, slope)
    # In the order of the paths.
    symbols, second, scaled, weight = symbols[order], second[order], scaled[order], weight[order]

    def cost(place: int, symbol: int, odd: int) -> float:
        level = 2 * symbol - odd * ((symbol > 0) - (symbol < 0))
        number = used[place] + SHIFT * odd
        bits = float(frequencies.size_bits[number, abs(symbol)])
        return float(weight[place] * (scaled[place] - level) ** 2 + slope * bits)

    for path in range(paths):
        places = range(path, len(tables), paths)
        found, state = 0.0, 0
        for place in places:
            assert bool(state % 2) == second[place]
            found += cost(place, int(symbols[place]), state % 2)
            state = next_reference(state, int(symbols[place]), states)
        costs = {
            (place, symbol, odd): cost(place, symbol, odd)
            for place in places
            for symbol in range(-4, 5)
            for odd in (0, 1)
        }
        least = np.inf
        for tried in itertools.product(range(-4, 5), repeat=4):
            total, state = 0.0, 0
            for place, symbol in zip(places, tried, strict=True):
                total += costs[place, symbol, state % 2]
                state = next_reference(state, symbol, states)
            least = min(least, total)
        # Sums of float32 numbers up to a few tens.
        assert found == pytest.approx(least, abs=1e-4)


@pytest.mark.parametrize(("states", "low", "high"), [(8, 1.0, 1.2), (256, 1.25, 1.4)])
def test_paths_lie_denser_than_symbols_alone(states: TrellisStates, low: float, high: float) -> None:
    """Without regard to bits: the theory's granular gains are 1.1 and 1.33 dB."""
    random = np.random.default_rng(4)
    tables = np.full(8192, TABLES - 1, np.uint8)
    scaled = random.uniform(-100.0, 100.0, len(tables))
    symbols, second = best_symbols(FREQUENCIES[states], tables, scaled, np.ones(len(tables)), 0.0)
    levels = SPACING * symbols - np.sign(symbols) * second
    alone = SPACING**2 / 12.0
    gain = 10.0 * np.log10(alone / np.mean(np.square(scaled - levels)))
    assert low < gain < high


def test_paths_through_eight_states_are_no_longer_than_128() -> None:
    assert [trellis_of(8).paths_for(count) for count in (0, 1024, 1025, 8192)] == [8, 8, 9, 64]
    assert trellis_of(256).paths_for(8192) == 1


def test_the_largest_values_find_symbols() -> None:
    tables = np.full(16, TABLES - 1, np.uint8)
    scaled = np.array([65530.0, -65530.0] * 8)
    symbols, second = best_symbols(FREQUENCIES[8], tables, scaled, np.ones(16), 0.0)
    levels = SPACING * symbols.astype(int) - np.sign(symbols) * second
    assert np.abs(levels - scaled).max() <= SPACING


def latents_of(weights: Weights, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Random codes, and latents of the weights' own spread."""
    random = np.random.default_rng(seed)
    config, context = weights.config, weights.stream.context
    codes = random.integers(0, config.codes, (config.code_stages, 2, 2, 2)).astype(np.uint8)
    spread = context.deviation / context.unit
    return codes, (random.standard_normal((4, 4, 4, config.latents)) * spread).astype(np.float32)


@pytest.mark.parametrize("quality", [0, 60, 200, 255])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", ["dependent_weights", "long_path_weights"])
def test_a_stream_decodes_to_what_was_quantised(
    quality: int, weighed: bool, name: str, request: pytest.FixtureRequest
) -> None:
    trained: Weights = request.getfixturevalue(name)
    stream = trained.stream
    codes, latents = latents_of(trained, 1)
    weights = np.random.default_rng(2).uniform(0.2, 5.0, latents.shape) if weighed else None
    symbols, quantised = stream.quantise(codes, latents, quality, weights)
    decoded = stream.decode(*stream.encode(symbols), (2, 2, 2), quality, len(symbols.tables))
    np.testing.assert_array_equal(decoded.latents, quantised.latents)
    assert len(symbols.tables) > 0
    if quality == 200:
        assert (np.concatenate(symbols.tables) >= TABLES).mean() > 0.1


def test_latents_out_of_all_reach_come_back_as_far_as_symbols_go(dependent_weights: Weights) -> None:
    stream = dependent_weights.stream
    codes, latents = latents_of(dependent_weights, 4)
    latents[0, 0, 0] = 1 << 30
    latents[3, 3, 3] = -(1 << 30)
    symbols, quantised = stream.quantise(codes, latents, 200)
    words, escapes = stream.encode(symbols)
    assert len(escapes) >= latents.shape[3]
    decoded = stream.decode(words, escapes, (2, 2, 2), 200, len(symbols.tables))
    np.testing.assert_array_equal(decoded.latents, quantised.latents)


def cost_of(weights: Weights, quality: int) -> float:
    """Squared error + slope * bits of random latents, in squared steps of rounding one by one."""
    stream = weights.stream
    codes, latents = latents_of(weights, 3)
    symbols, quantised = stream.quantise(codes, latents, quality)
    alone = stream.context.step[quality] * (1.0 if weights.config.first_dependent is None else 2 / WIDENING)
    error = np.square((latents - quantised.latents) / alone).sum()
    words, _ = stream.encode(symbols)
    return float(error + SLOPE * 32 * len(words))


def test_error_and_bits_together_are_less_than_without(
    tiny_weights: Weights, dependent_weights: Weights
) -> None:
    """Of the same networks, at the same worth of a bit; at fine qualities by a bit for seven latents.

    And less again with more states.
    """
    larger = build_weights(replace(TINY_DEPENDENT, trellis_states=256), seed=1)
    for quality in (120, 200, 255):
        costs = [cost_of(weights, quality) for weights in (larger, dependent_weights, tiny_weights)]
        assert costs[0] < costs[1] < costs[2]


def test_chunks_come_back(
    dependent_weights: Weights, chunk_format: Callable[[str], ChunkFormat], smooth_volume: SmoothVolume
) -> None:
    chunk = chunk_format("float32")
    voxels = smooth_volume(chunk.shape, 5) * chunk.scale + chunk.offset
    encoder = ChunkEncoder(dependent_weights, chunk)
    (draft,) = encoder.drafts([voxels.astype(np.float32)], 200)
    packed = encoder.pack(draft)
    decoded = ChunkDecoder(dependent_weights.decoder(), chunk).decode(packed.data)
    error = np.mean(np.square(decoded.astype(np.float64) - voxels))
    assert error == pytest.approx(packed.error.mse, rel=1e-3)


def test_tables_of_the_second_quantiser_stand_behind_the_first(dependent_weights: Weights) -> None:
    assert len(dependent_weights.stream.frequencies.reach) == 2 * TABLES - 18


@pytest.mark.parametrize("first", [19, 17, None])
def test_tables_that_do_not_fit_the_trellis_are_refused(
    first: int | None, dependent_weights: Weights
) -> None:
    config = replace(dependent_weights.config, first_dependent=first)
    with pytest.raises(WeightsError, match="damaged"):
        Weights(config, dependent_weights.tensors).check_stream()


@pytest.mark.parametrize(
    "given",
    [{"trellis_states": 16}, {"trellis_states": "256"}, {"first_dependent": None, "trellis_states": 256}],
)
def test_a_trellis_that_there_is_not_is_refused(given: dict[str, object], dependent_weights: Weights) -> None:
    plain = dependent_weights.config.to_json() | given
    with pytest.raises(ValueError, match="trellis_states"):
        CodecConfig.parse(json.loads(json.dumps(plain)))


@pytest.mark.parametrize("first", [0, 85, "18"])
def test_a_trellis_that_begins_nowhere_is_refused(first: object, dependent_weights: Weights) -> None:
    plain = dependent_weights.config.to_json() | {"first_dependent": first}
    with pytest.raises(ValueError, match="first_dependent"):
        CodecConfig.parse(json.loads(json.dumps(plain)))


def test_training_on_gives_a_stream_its_trellis(tiny_weights: Weights, smooth_volume: SmoothVolume) -> None:
    """Symbols lie a quarter octave further apart then, on paths whose steps are half of that."""
    settings = TrainingConfig(teacher_steps=0, student_steps=1, learning_rate=1e-9)
    trainer = Trainer(TINY_DEPENDENT, settings, start=tiny_weights)
    tiles = torch.from_numpy(np.stack([smooth_volume((32, 32, 32), n) for n in (1, 2)])[:, None])
    trainer.step(tiles)
    made = trainer.finish([tiles], {})
    assert made.config.first_dependent == 18
    before, after = tiny_weights.stream.context, made.stream.context
    wanted = before.step * before.unit * (WIDENING / SPACING)
    # Steps are whole, of 64 units or more.
    np.testing.assert_allclose(after.step * after.unit, wanted, rtol=1 / 64)
    np.testing.assert_array_equal(after.gain, before.gain - 4)
    again = Trainer(made.config, settings, start=made)
    again.step(tiles)
    kept = again.finish([tiles], {}).stream.context
    np.testing.assert_array_equal(kept.gain, after.gain)
    np.testing.assert_array_equal(kept.step, after.step)


def test_gains_come_back_from_whole_numbers() -> None:
    """However uneven they are, and then they stay: a training rounds them three times."""
    prior = ContextPrior(TINY_DEPENDENT)
    with torch.no_grad():
        prior.log_gain.copy_(torch.from_numpy(np.random.default_rng(5).uniform(-6, 6, (9, 8))))
    gain = prior.log_gain.detach().clone()
    entries = torch.zeros(2, 16, 4)
    prior.from_integers(prior.to_integers(entries))
    # They are rounded to a 16th of an octave.
    assert (prior.log_gain - gain).abs().max() <= 1 / 32
    rounded = prior.log_gain.detach().clone()
    prior.from_integers(prior.to_integers(entries))
    assert torch.equal(prior.log_gain, rounded)


@pytest.mark.parametrize("keep", [False, True])
def test_only_what_is_counted_anew_is_interlaced_and_comes_to_lie_on_paths(
    keep: bool, tiny_weights: Weights
) -> None:
    assert trained_config(TINY, keep_stream=keep).version == (1 if keep else 5)
    settings = TrainingConfig(teacher_steps=0, student_steps=1, keep_stream=keep)
    if keep:
        with pytest.raises(SettingsError, match="another configuration"):
            Trainer(TINY_DEPENDENT, settings, start=tiny_weights)
    else:
        Trainer(TINY_DEPENDENT, settings, start=tiny_weights)

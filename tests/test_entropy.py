"""The entropy coder: exact round trips, and words that follow from whole numbers alone."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ucray.codec import entropy
from ucray.codec.entropy import TOTAL, Codes, StreamTables, Symbols, logistic_weights, to_frequencies
from ucray.errors import ChunkError

STAGES, CODES, LATENTS = 2, 7, 3
STRIDE = (1, 2, 2)
GRID = (2, 1, 3)
LATENT_SHAPE = (LATENTS, 2, 2, 6)
QUALITY = 100

INITIAL_STATE = 0
"""State of the rANS coder before the first letter is pushed."""

codes_arrays = arrays(np.uint8, (STAGES, *GRID), elements=st.integers(0, CODES - 1))
# The widest table reaches to 384: many of these are escapes, near zero most are not.
symbol_arrays = arrays(np.int32, LATENT_SHAPE, elements=st.integers(-3, 3) | st.integers(-32767, 32767))
qualities = st.integers(0, 255)


def build_tables() -> StreamTables:
    """Random tables that use the whole range of scales, coarse to fine."""
    random = np.random.default_rng(5)
    cells = math.prod(STRIDE)
    logistic = logistic_weights()
    return StreamTables(
        mean=random.integers(-127, 128, (STAGES, CODES, cells, LATENTS)).astype(np.int8),
        mean_step=np.array([0.5, 0.25, 0.125], np.float32),
        scale=random.integers(-40, 41, (STAGES, CODES, cells, LATENTS)).astype(np.int8),
        base=np.array([40, 0, -40], np.int16),
        gain=(np.linspace(-64, 64, 256).round()[:, None] + np.arange(LATENTS)).astype(np.int16),
        reach=np.array([(len(w) - 2) // 2 for w in logistic], np.int16),
        frequencies=np.concatenate([to_frequencies(w) for w in logistic]),
        code_frequencies=np.stack([to_frequencies(random.random(CODES)) for _ in range(STAGES)]),
        code_stride=STRIDE,
    )


TABLES = build_tables()


def example(seed: int = 0) -> tuple[Codes, Symbols]:
    """Codes, and small symbols of which every table holds a few."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, CODES, (STAGES, *GRID)).astype(np.uint8)
    return codes, random.integers(-2, 3, LATENT_SHAPE).astype(np.int32)


def table_reference(tables: StreamTables, codes: Codes, quality: int) -> npt.NDArray[np.int64]:
    """`table_indices` latent by latent, in Python's whole numbers."""
    indices = np.empty(LATENT_SHAPE, np.int64)
    for latent, z, y, x in np.ndindex(*LATENT_SHAPE):
        a, b, c = STRIDE
        cell = ((z % a) * b + y % b) * c + x % c
        units = int(tables.base[latent]) + int(tables.gain[quality, latent])
        for stage in range(STAGES):
            units += int(tables.scale[stage, codes[stage, z // a, y // b, x // c], cell, latent])
        # Table 0 stands at -4.5 octaves of 16 units; two units a table, rounded half up.
        indices[latent, z, y, x] = min(max((units + 72 + 1) // 2, 0), len(tables.reach) - 1)
    return indices


def rans_words(letters: list[tuple[int, list[int]]]) -> list[int]:
    """Words of a rANS coder of 64-bit state for (letter, frequencies), first decoded first.

    Frequencies sum to 2^16 and become intervals of 24 bits; every letter keeps at least one.
    """
    state, words = INITIAL_STATE, []
    for letter, frequencies in reversed(letters):
        room = 2**24 - len(frequencies)
        lefts = [sum(frequencies[:i]) * room // 2**16 + i for i in range(len(frequencies))] + [2**24]
        left, width = lefts[letter], lefts[letter + 1] - lefts[letter]
        if state >> 40 >= width:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // width) << 24 | left + state % width
    while state:
        words.append(state & 0xFFFFFFFF)
        state >>= 32
    return words


def reference_words(tables: StreamTables, codes: Codes, symbols: Symbols, quality: int) -> list[int]:
    """`entropy.encode` in Python's whole numbers: codes stage by stage, then table by table."""
    ends = np.cumsum(2 * tables.reach.astype(int) + 2)
    frequencies = [part.tolist() for part in np.split(tables.frequencies, ends[:-1])]
    letters = [
        (int(code), tables.code_frequencies[stage].tolist())
        for stage in range(STAGES)
        for code in codes[stage].reshape(-1)
    ]
    indices = table_reference(tables, codes, quality).reshape(-1)
    for table, reach in enumerate(tables.reach.tolist()):
        for symbol in symbols.reshape(-1)[indices == table].tolist():
            letters.append((symbol + reach if abs(symbol) <= reach else 2 * reach + 1, frequencies[table]))
    return rans_words(letters)


@given(codes_arrays, symbol_arrays, qualities)
def test_round_trip(codes: Codes, symbols: Symbols, quality: int) -> None:
    words, escapes = entropy.encode(TABLES, codes, symbols, quality)
    decoded_codes, decoded = entropy.decode(TABLES, words, escapes, GRID, quality)
    np.testing.assert_array_equal(decoded_codes, codes)
    np.testing.assert_array_equal(decoded, symbols)
    assert decoded_codes.dtype == np.uint8


@given(codes_arrays, symbol_arrays, qualities)
def test_escapes_are_the_symbols_that_their_table_does_not_reach(
    codes: Codes, symbols: Symbols, quality: int
) -> None:
    _, escapes = entropy.encode(TABLES, codes, symbols, quality)
    indices = table_reference(TABLES, codes, quality)
    expected = [s for t, r in enumerate(TABLES.reach) for s in symbols[indices == t].tolist() if abs(s) > r]
    assert escapes.tolist() == expected


@pytest.mark.parametrize("symbol", [0, 32767, -32767])
def test_round_trip_of_equal_symbols(symbol: int) -> None:
    """One letter a table, and most tables are not used at all."""
    codes = np.zeros((STAGES, *GRID), np.uint8)
    symbols = np.full(LATENT_SHAPE, symbol, np.int32)
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    assert len(escapes) == (symbols.size if symbol else 0)
    np.testing.assert_array_equal(entropy.decode(TABLES, words, escapes, GRID, QUALITY)[1], symbols)


def test_round_trip_of_the_first_letter_of_every_table() -> None:
    """These letters leave a rANS state of zero at zero: the coder may have nothing to write."""
    codes = np.zeros((STAGES, *GRID), np.uint8)
    symbols = -TABLES.reach[TABLES.table_indices(codes, QUALITY)].astype(np.int32)
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    np.testing.assert_array_equal(entropy.decode(TABLES, words, escapes, GRID, QUALITY)[1], symbols)


@settings(max_examples=25)
@given(codes_arrays, symbol_arrays, qualities)
def test_words_follow_from_whole_numbers(codes: Codes, symbols: Symbols, quality: int) -> None:
    words, _ = entropy.encode(TABLES, codes, symbols, quality)
    assert words.tolist() == reference_words(TABLES, codes, symbols, quality)


@given(codes_arrays, qualities)
def test_table_indices_follow_from_whole_numbers(codes: Codes, quality: int) -> None:
    np.testing.assert_array_equal(
        TABLES.table_indices(codes, quality), table_reference(TABLES, codes, quality)
    )


def test_table_indices_ignore_what_only_the_reconstruction_needs() -> None:
    codes, _ = example()
    other = replace(TABLES, mean=-TABLES.mean, mean_step=TABLES.mean_step * np.float32(np.pi))
    np.testing.assert_array_equal(other.table_indices(codes, QUALITY), TABLES.table_indices(codes, QUALITY))


def test_table_indices_stay_within_the_tables() -> None:
    codes, _ = example()
    low, high = (replace(TABLES, base=np.full(LATENTS, units, np.int16)) for units in (-32768, 32767))
    assert (low.table_indices(codes, QUALITY) == 0).all()
    assert (high.table_indices(codes, QUALITY) == len(TABLES.reach) - 1).all()


def test_means_are_float32_and_follow_the_codes() -> None:
    """The synthesis takes float32; a mean in float64 would not go through it."""
    codes, _ = example()
    means = TABLES.means(codes)
    assert means.dtype == np.float32
    steps = sum(int(TABLES.mean[stage, codes[stage, 1, 0, 2], 3, 2]) for stage in range(STAGES))
    # Cell 3 of code (1, 0, 2) is the latent at (1, 0 * 2 + 1, 2 * 2 + 1).
    assert means[2, 1, 1, 5] == steps * 0.125


def test_log_gain_counts_sixteenths_of_an_octave() -> None:
    assert TABLES.log_gain(255).tolist() == [64 / 16, 65 / 16, 66 / 16]


def test_cut_words_are_refused() -> None:
    codes, symbols = example()
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    assert len(escapes) == 0
    # No words at all are a chunk of nothing but first letters; of these the chunk's checksum knows.
    for count in range(1, len(words)):
        for cut in (words[:count], words[len(words) - count :]):
            with pytest.raises(ChunkError):
                entropy.decode(TABLES, cut, escapes, GRID, QUALITY)


def test_left_over_words_are_refused() -> None:
    codes, symbols = example()
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    for extra in (0, 1, 0xFFFFFFFF):
        for more in ([*words, extra], [extra, *words]):
            with pytest.raises(ChunkError):
                entropy.decode(TABLES, np.array(more, np.uint32), escapes, GRID, QUALITY)


@pytest.mark.parametrize("grid", [(1, 1, 3), (2, 1, 2), (2, 2, 3), (4, 1, 3)])
def test_words_of_another_chunk_shape_are_refused(grid: tuple[int, int, int]) -> None:
    codes, symbols = example()
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    with pytest.raises(ChunkError):
        entropy.decode(TABLES, words, escapes, grid, QUALITY)


def test_missing_and_left_over_escapes_are_refused() -> None:
    codes, symbols = example()
    symbols[0, 0, 0, :2] = 30000, -30000
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    assert len(escapes) == 2
    for damaged in (escapes[:1], np.append(escapes, escapes[:1])):
        with pytest.raises(ChunkError):
            entropy.decode(TABLES, words, damaged, GRID, QUALITY)


def test_likely_symbols_take_about_their_information() -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, CODES, (STAGES, 8, 8, 8)).astype(np.uint8)
    indices = TABLES.table_indices(codes, QUALITY)
    ends = np.cumsum(2 * TABLES.reach.astype(int) + 2)
    tables = np.split(TABLES.frequencies, ends[:-1])
    symbols = np.empty(indices.shape, np.int32)
    bits = sum(-np.log2(TABLES.code_frequencies[s][codes[s]] / TOTAL).sum() for s in range(STAGES))
    for table, frequencies in enumerate(tables):
        places = indices == table
        letters = random.choice(len(frequencies) - 1, places.sum(), p=_shares(frequencies[:-1]))
        symbols[places] = letters - int(TABLES.reach[table])
        bits -= np.log2(frequencies[letters] / TOTAL).sum()
    words, escapes = entropy.encode(TABLES, codes, symbols, QUALITY)
    assert len(escapes) == 0
    # A first state and the last word may stand half empty: 64 bits; 2^-8 a letter for 24-bit models.
    assert bits - 64 < 32 * len(words) < bits + 64 + 2**-8 * (symbols.size + codes.size)


def _shares(frequencies: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    return np.asarray(frequencies / frequencies.sum(dtype=np.float64))


@given(arrays(np.float64, st.integers(2, 600), elements=st.floats(0.0, 1e12)))
def test_frequencies_are_whole_positive_and_close(weights: npt.NDArray[np.float64]) -> None:
    weights[0] += 1.0
    frequencies = to_frequencies(weights)
    assert frequencies.dtype == np.uint16
    assert int(frequencies.sum(dtype=np.int64)) == TOTAL
    assert frequencies.min() >= 1
    # Everyone gets 1, a share of what is left, and the rounding of that share.
    shares = weights / weights.sum() * (TOTAL - len(weights))
    # The share itself carries a rounding of float64: 2^16 * 2^-52, several times.
    assert (np.abs(frequencies - (shares + 1.0)) < 1.0 + 1e-9).all()


@given(arrays(np.float64, st.integers(2, 100), elements=st.floats(1e-6, 1e6)), st.integers(-20, 20))
def test_frequencies_do_not_depend_on_the_unit(weights: npt.NDArray[np.float64], octaves: int) -> None:
    """A power of two scales float64 exactly."""
    np.testing.assert_array_equal(to_frequencies(weights), to_frequencies(weights * 2.0**octaves))


def test_logistic_tables_hold_the_mass_of_their_symbols() -> None:
    tables = logistic_weights()
    # From -4.5 to 6 octaves, eight tables an octave.
    assert len(tables) == 85
    for table in (0, 36, 84):
        weights, scale = tables[table], 2.0 ** (-4.5 + table / 8)
        reach = (len(weights) - 2) // 2
        for symbol in (-reach, -1, 0, 1, reach):
            edges = [1.0 / (1.0 + math.exp(-(symbol + side) / scale)) for side in (-0.5, 0.5)]
            # Differences of numbers near 1 in float64.
            assert weights[symbol + reach] == pytest.approx(edges[1] - edges[0], abs=1e-15)


def test_logistic_tables_are_whole_and_reach_six_scales() -> None:
    for table, weights in enumerate(logistic_weights()):
        reach = (len(weights) - 2) // 2
        assert len(weights) == 2 * reach + 2
        assert reach >= 6.0 * 2.0 ** (-4.5 + table / 8)
        # Sums of up to 770 float64 numbers; the escape has a floor of 1e-7.
        assert weights.sum() == pytest.approx(1.0, abs=2e-7)
        np.testing.assert_allclose(weights[:-1], weights[-2::-1], rtol=0, atol=1e-15)
        assert (np.diff(weights[: reach + 1]) >= 0).all()


@pytest.mark.parametrize("module", ["ucray.codec.entropy", "ucray.codec.bitstream"])
def test_parsing_a_stream_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

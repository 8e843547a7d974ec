"""The entropy coder: exact round trips, and words that follow from whole numbers alone."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ucray.codec import entropy
from ucray.codec.context import TABLES, Codes, Tables
from ucray.codec.entropy import SymbolReader
from ucray.codec.frequencies import (
    SILENT,
    TOTAL,
    FrequencyTables,
    logistic_weights,
    to_frequencies,
)
from ucray.errors import ChunkError

STAGES, CODES = 2, 7
GRID = (2, 1, 3)

INITIAL_STATE = 0
"""State of the rANS coder before the first letter is pushed."""

Symbols = npt.NDArray[np.int32]
Part = tuple[Tables, Symbols]


def build_frequencies() -> FrequencyTables:
    """Logistic tables, coarse to fine, and uneven codes."""
    random = np.random.default_rng(5)
    logistic = logistic_weights()
    return FrequencyTables(
        reach=np.array([(len(w) - 2) // 2 for w in logistic], np.int16),
        frequencies=np.concatenate([to_frequencies(w) for w in logistic]),
        code_frequencies=np.stack([to_frequencies(random.random(CODES)) for _ in range(STAGES)]),
    )


FREQUENCIES = build_frequencies()

codes_arrays = arrays(np.uint8, (STAGES, *GRID), elements=st.integers(0, CODES - 1))
# The widest table reaches to 384: many of these are escapes, near zero most are not.
some_symbols = st.integers(-3, 3) | st.integers(-32767, 32767)


@st.composite
def some_parts(draw: st.DrawFn) -> list[Part]:
    """Passes of any length; the silent table has zeros alone."""
    parts = []
    for length in draw(st.lists(st.integers(0, 40), max_size=4)):
        tables = draw(arrays(np.uint8, length, elements=st.integers(0, TABLES - 1)))
        symbols = draw(arrays(np.int32, length, elements=some_symbols))
        parts.append((tables, symbols * (tables != SILENT)))
    return parts


def read(words: npt.NDArray[np.uint32], escapes: npt.NDArray[np.int32], parts: list[Part]) -> list[Symbols]:
    """Codes are read and thrown away; symbols by the tables of `parts`."""
    reader = SymbolReader(FREQUENCIES, words, escapes)
    reader.codes(GRID)
    found = [reader.symbols(tables) for tables, _ in parts]
    reader.finish()
    return found


def example(seed: int = 0) -> tuple[Codes, list[Part]]:
    """Codes, and two passes of small symbols in every table."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, CODES, (STAGES, *GRID)).astype(np.uint8)
    parts = []
    for length in (70, 200):
        tables = random.integers(1, TABLES, length).astype(np.uint8)
        parts.append((tables, random.integers(-2, 3, length).astype(np.int32)))
    return codes, parts


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


def reference_words(codes: Codes, parts: list[Part]) -> list[int]:
    """`entropy.encode` in Python's whole numbers: codes by stage, then symbols by pass and table."""
    ends = np.cumsum(2 * FREQUENCIES.reach.astype(int) + 2)
    frequencies = [part.tolist() for part in np.split(FREQUENCIES.frequencies, ends[:-1])]
    letters = [
        (int(code), FREQUENCIES.code_frequencies[stage].tolist())
        for stage in range(STAGES)
        for code in codes[stage].reshape(-1)
    ]
    for tables, symbols in parts:
        for table, reach in list(enumerate(FREQUENCIES.reach.tolist()))[1:]:
            for symbol in symbols[tables == table].tolist():
                letter = symbol + reach if abs(symbol) <= reach else 2 * reach + 1
                letters.append((letter, frequencies[table]))
    return rans_words(letters)


@given(codes_arrays, some_parts())
def test_round_trip(codes: Codes, parts: list[Part]) -> None:
    words, escapes = entropy.encode(FREQUENCIES, codes, parts)
    reader = SymbolReader(FREQUENCIES, words, escapes)
    decoded = reader.codes(GRID)
    np.testing.assert_array_equal(decoded, codes)
    assert decoded.dtype == np.uint8
    for tables, symbols in parts:
        np.testing.assert_array_equal(reader.symbols(tables), symbols)
    reader.finish()


@given(codes_arrays, some_parts())
def test_escapes_are_the_symbols_that_their_table_does_not_reach(codes: Codes, parts: list[Part]) -> None:
    _, escapes = entropy.encode(FREQUENCIES, codes, parts)
    expected = [
        symbol
        for tables, symbols in parts
        for table, reach in enumerate(FREQUENCIES.reach)
        for symbol in symbols[tables == table].tolist()
        if abs(symbol) > reach
    ]
    assert escapes.tolist() == expected


def test_the_silent_table_takes_no_words() -> None:
    codes, parts = example()
    silent = (np.full(500, SILENT, np.uint8), np.zeros(500, np.int32))
    words, _ = entropy.encode(FREQUENCIES, codes, parts)
    more, escapes = entropy.encode(FREQUENCIES, codes, [silent, *parts, silent])
    np.testing.assert_array_equal(more, words)
    assert not read(more, escapes, [silent, *parts])[0].any()


def test_round_trip_of_the_first_letter_of_every_table() -> None:
    """These letters leave a rANS state of zero at zero: the coder may have nothing to write."""
    codes = np.zeros((STAGES, *GRID), np.uint8)
    tables = np.arange(1, TABLES, dtype=np.uint8)
    part = (tables, -FREQUENCIES.reach[tables].astype(np.int32))
    words, escapes = entropy.encode(FREQUENCIES, codes, [part])
    np.testing.assert_array_equal(read(words, escapes, [part])[0], part[1])


@settings(max_examples=25)
@given(codes_arrays, some_parts())
def test_words_follow_from_whole_numbers(codes: Codes, parts: list[Part]) -> None:
    words, _ = entropy.encode(FREQUENCIES, codes, parts)
    assert words.tolist() == reference_words(codes, parts)


def test_cut_words_are_refused_or_read_as_others() -> None:
    """An empty coder goes on giving first letters; the chunk's checksum is what finds every cut."""
    codes, parts = example()
    words, escapes = entropy.encode(FREQUENCIES, codes, parts)
    assert len(escapes) == 0
    refused = 0
    for count in range(len(words)):
        for cut in (words[:count], words[len(words) - count :]):
            try:
                found = read(cut, escapes, parts)
            except ChunkError:
                refused += 1
            else:
                assert any((one != symbols).any() for one, (_, symbols) in zip(found, parts, strict=True))
    assert refused > len(words)


def test_left_over_words_are_refused() -> None:
    codes, parts = example()
    words, escapes = entropy.encode(FREQUENCIES, codes, parts)
    for extra in (0, 1, 0xFFFFFFFF):
        for more in ([*words, extra], [extra, *words]):
            with pytest.raises(ChunkError):
                read(np.array(more, np.uint32), escapes, parts)


def test_missing_and_left_over_escapes_are_refused() -> None:
    codes, parts = example()
    parts[1][1][:2] = 30000, -30000
    words, escapes = entropy.encode(FREQUENCIES, codes, parts)
    assert len(escapes) == 2
    for damaged in (escapes[:1], np.append(escapes, escapes[:1])):
        with pytest.raises(ChunkError):
            read(words, damaged, parts)


def test_likely_symbols_take_about_their_information() -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, CODES, (STAGES, *GRID)).astype(np.uint8)
    tables = random.integers(1, TABLES, 20000).astype(np.uint8)
    symbols = np.empty(len(tables), np.int32)
    bits = sum(-np.log2(FREQUENCIES.code_frequencies[s][codes[s]] / TOTAL).sum() for s in range(STAGES))
    for table, frequencies in enumerate(FREQUENCIES.tables):
        places = tables == table
        letters = random.choice(len(frequencies) - 1, places.sum(), p=_shares(frequencies[:-1]))
        symbols[places] = letters - int(FREQUENCIES.reach[table])
        bits -= np.log2(frequencies[letters] / TOTAL).sum()
    words, escapes = entropy.encode(FREQUENCIES, codes, [(tables, symbols)])
    assert len(escapes) == 0
    # A first state and the last word may stand half empty: 64 bits; 2^-8 a letter for 24-bit models.
    assert bits - 64 < 32 * len(words) < bits + 64 + 2**-8 * (symbols.size + codes.size)


def test_extra_bits_are_those_of_one_symbol_more() -> None:
    reach = int(FREQUENCIES.reach[40])
    table = FREQUENCIES.tables[40].astype(float)
    expected = [math.log2(table[reach] / table[reach + 1]), math.log2(table[reach + 1] / table[reach + 2])]
    np.testing.assert_allclose(FREQUENCIES.extra_bits[40], expected, rtol=1e-6)


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


@pytest.mark.parametrize("module", ["ucray.codec.stream", "ucray.codec.bitstream"])
def test_parsing_a_stream_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Selections: slices and places of an array, as numpy takes them, as a box and what is taken of it."""

from __future__ import annotations

from typing import Any

from ucray.grid import Box, Shape3, triple


def box_of(selection: Any, shape: Shape3) -> tuple[Box, tuple[Any, ...]]:
    """The box of a volume of `shape` that a selection lies in, and what is to be taken of that box.

    Raises
    ------
    IndexError
        If there are too many parts, one is none that numpy takes, or it lies outside.
    """
    parts = selection if isinstance(selection, tuple) else (selection,)
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        filled = 3 - (len(parts) - 1)
        parts = (*parts[:place], *[slice(None)] * filled, *parts[place + 1 :])
    parts = (*parts, *[slice(None)] * (3 - len(parts)))
    if len(parts) != 3:
        raise IndexError(f"{len(parts)} indices for three axes")
    spans: list[tuple[int, int]] = []
    within: list[Any] = []
    for part, extent in zip(parts, shape, strict=True):
        if isinstance(part, slice):
            places = range(extent)[part]
            first, last = (min(places), max(places) + 1) if places else (0, 0)
            spans.append((first, last))
            # The box ends with the last place that is taken, so that going backwards begins there.
            within.append(slice(None, None, places.step))
        else:
            try:
                spans.append((range(extent)[int(part)], range(extent)[int(part)] + 1))
            except (TypeError, ValueError):
                raise IndexError(f"{part!r} is neither a slice nor a place") from None
            within.append(0)
    return Box(triple(a for a, _ in spans), triple(b for _, b in spans)), tuple(within)

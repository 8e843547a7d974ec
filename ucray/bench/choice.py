"""The largest ratio at which neurons can still be traced, out of what a traced benchmark measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ucray.bench.run import STUDENT
from ucray.bench.task import ORIGINAL, Score, Traced

SHORT = 1.2
"""By what factor the ratio of a setting may fall short of what was asked for: settings lie that far apart."""

NOTHING = 1e-3
"""An original's figure is not taken for smaller when changes are set against it."""


@dataclass(frozen=True)
class Loss:
    """What one codec loses at one ratio asked for, in per cent of the original's figure; below 0 it gains.

    It is the largest of the rise of the variation of information, the rise of the adapted Rand error and,
    where there are no neurons to trace, the fall of the membranes' F1. `fitted` is what isotonic regression
    makes of `percent`: that fewer bytes trace better is chance.
    """

    codec: str
    wanted: float
    ratio: float
    percent: float
    fitted: float


@dataclass(frozen=True)
class Choice:
    """The ratio that was chosen, the curve it was chosen from, and who is as good and simpler.

    `simpler` are other codecs that keep the loss up to a ratio as large, with that ratio. `ratio` is 0 where
    more is lost at the smallest already.
    """

    ratio: float
    losses: tuple[Loss, ...]
    simpler: dict[str, float]
    missing: dict[str, str]


def losses(scores: Sequence[Score]) -> list[Loss]:
    """What each codec loses at each ratio."""
    before = {score.figure: score.value for score in scores if score.codec == ORIGINAL}
    found: dict[tuple[str, float, float], dict[str, float]] = {}
    for score in scores:
        if score.codec != ORIGINAL:
            found.setdefault((score.codec, score.wanted, score.ratio), {})[score.figure] = score.loss
    percents = {key: 100.0 * _largest(lost, before) for key, lost in found.items()}
    fitted: dict[tuple[str, float, float], float] = {}
    for codec in dict.fromkeys(codec for codec, _, _ in percents):
        keys = sorted(key for key in percents if key[0] == codec)
        fitted |= dict(zip(keys, _rising([percents[key] for key in keys]), strict=True))
    return [Loss(*key, percent, fitted[key]) for key, percent in percents.items()]


def choose(traced: Traced, percent: float) -> Choice:
    """The largest ratio at which ucray loses at most `percent`, by what is fitted to the ratios tried."""
    found = losses(traced.scores)
    reached = {codec: _reached(found, codec, percent) for codec in dict.fromkeys(one.codec for one in found)}
    ours = reached.get(STUDENT, 0.0)
    simpler = {codec: ratio for codec, ratio in reached.items() if codec != STUDENT and ratio >= ours}
    return Choice(ours, tuple(found), simpler, traced.missing)


def draw_choice(choice: Choice, percent: float, file: Path, title: str) -> None:
    """What is lost against the ratio, as measured and as fitted, the limit, and what was chosen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for codec in dict.fromkeys(one.codec for one in choice.losses):
        curve = sorted((one for one in choice.losses if one.codec == codec), key=lambda one: one.ratio)
        ratios = [one.ratio for one in curve]
        (line,) = axis.plot(ratios, [one.fitted for one in curve], label=codec)
        axis.plot(ratios, [one.percent for one in curve], "o", color=line.get_color())
    axis.axhline(percent, color="black", linestyle=":", label=f"{percent:g} % allowed")
    if choice.ratio:
        axis.axvline(choice.ratio, color="grey", linewidth=1, label=f"chosen: ratio {choice.ratio:g}")
    axis.set_xscale("log", base=2)
    # What is lost at the coarsest ratios would leave nothing to see of the limit.
    axis.set_yscale("symlog", linthresh=max(2.0 * percent, 1.0))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("ratio")
    axis.set_ylabel("segmentation loss, % of the original's figure")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by squares, that do not fall."""
    from sklearn.isotonic import isotonic_regression

    return [float(value) for value in isotonic_regression(values)]


def _largest(lost: dict[str, float], before: dict[str, float]) -> float:
    if "vi_split" not in lost:
        return -lost["f1"] / max(before["f1"], NOTHING)
    information = before["vi_split"] + before["vi_merge"]
    return max(
        (lost["vi_split"] + lost["vi_merge"]) / max(information, NOTHING),
        lost["rand_error"] / max(before["rand_error"], NOTHING),
    )


def _reached(found: Sequence[Loss], codec: str, percent: float) -> float:
    """The last ratio before a codec first loses more; 0 where it does so at once, or was not measured."""
    reached = 0.0
    for one in sorted((one for one in found if one.codec == codec), key=lambda one: one.wanted):
        # Nor is a ratio reached that a codec's coarsest setting falls short of.
        if not one.fitted <= percent or one.ratio * SHORT < one.wanted:
            break
        reached = one.wanted
    return reached

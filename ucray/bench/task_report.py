"""The report of a traced benchmark: a table, curves, and a crop as each codec leaves it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ucray.bench.outlines import draw
from ucray.bench.report import report_folder
from ucray.bench.task import ORIGINAL, Score, Traced
from ucray.bench.tissue import AROUND

TASK_FILE = "task.md"


def write_task(found: Traced, folder: str, title: str) -> Path:
    """Write task.csv, task.md, task.png and outlines.png into a folder; the path of the table."""
    place = report_folder(folder)
    with (place / "task.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Score)])
        writer.writerows(dataclasses.astuple(score) for score in found.scores)
    table = place / TASK_FILE
    table.write_text(task_to_markdown(found, title))
    _plot(found.scores, place / "task.png", title)
    if found.panels:
        draw(found.panels, place / "outlines.png", title)
    return table


def task_to_markdown(found: Traced, title: str) -> str:
    """A table with a row for each codec and ratio asked for, a column for each figure; what is missing."""
    names = list(dict.fromkeys(score.figure for score in found.scores))
    lines = [
        f"# {title}",
        "",
        "Means over blocks, each looked at by what learnt from the other half, and over "
        f"{2 * AROUND + 1} thresholds of segments; in brackets what changes against the original, with its "
        "95 % interval over blocks.",
        "",
        "| codec | ratio | PSNR | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for at in range(0, len(found.scores), len(names)):
        row = found.scores[at : at + len(names)]
        codec, ratio, psnr = row[0].codec, row[0].ratio, row[0].psnr
        cells = [
            f"{s.value:.4f}"
            + ("" if codec == ORIGINAL else f" ({s.loss:+.4f}; {s.low:+.4f} to {s.high:+.4f})")
            for s in row
        ]
        shown = "" if codec == ORIGINAL else f"{psnr:.2f}"
        lines.append(f"| {codec} | {ratio:.1f} | {shown} | " + " | ".join(cells) + " |")
    lines += ["", *(f"Missing: {codec}: {reason}." for codec, reason in found.missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def _plot(scores: Sequence[Score], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(score.figure for score in scores))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        mine = [score for score in scores if score.figure == name]
        for codec in dict.fromkeys(score.codec for score in mine):
            curve = sorted((s for s in mine if s.codec == codec), key=lambda s: s.ratio)
            if codec == ORIGINAL:
                axis.axhline(curve[0].value, color="black", linestyle=":", label=codec)
                continue
            axis.plot(
                [s.ratio for s in curve], [s.value for s in curve], marker="o", markersize=4, label=codec
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("ratio")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

"""What a benchmark leaves: a table (CSV, Markdown), BD-rates, and rate-distortion plots (PNG, SVG)."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ucray.bench.run import Bench, Point
from ucray.errors import SettingsError

FEWEST = 3
"""Points that a curve needs for a BD-rate."""


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by codec, by rising ratio."""
    found: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.ratio):
        found.setdefault(point.codec, []).append(point)
    return found


def bd_rate(anchor: Sequence[Point], test: Sequence[Point]) -> float | None:
    """Bytes of `test` against `anchor` at equal PSNR, in percent; None where they cannot be compared.

    Bjontegaard delta rate (VCEG-M33) over the PSNR that both reach, by monotone cubic pieces.
    """
    import bjontegaard

    pairs = [_monotone(curve) for curve in (anchor, test)]
    if any(len(curve) < FEWEST for curve in pairs):
        return None
    low = max(min(p.psnr for p in curve) for curve in pairs)
    high = min(max(p.psnr for p in curve) for curve in pairs)
    if low >= high:
        return None
    (rates, psnrs), (test_rates, test_psnrs) = (
        ([1 / p.ratio for p in curve], [p.psnr for p in curve]) for curve in pairs
    )
    found = float(
        bjontegaard.bd_rate(
            rates, psnrs, test_rates, test_psnrs, "pchip", require_matching_points=False, min_overlap=0
        )
    )
    return found if math.isfinite(found) else None


def write_report(bench: Bench, folder: str, title: str) -> list[str]:
    """Write table.csv, table.md, psnr.* and ssim.* into a folder; names of the files.

    Raises
    ------
    SettingsError
        If the folder cannot be made.
    """
    place = report_folder(folder)
    with (place / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Point)])
        writer.writerows(dataclasses.astuple(point) for point in bench.points)
    (place / "table.md").write_text(to_markdown(bench, title))
    names = ["table.csv", "table.md"]
    for measure, label in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
        names += _plot(bench, place, measure, label, title)
    return names


def report_folder(folder: str) -> Path:
    """The folder of a report, made if it is not there; raises SettingsError if it cannot be."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"-o {folder}: {error.strerror}") from None
    return place


def to_markdown(bench: Bench, title: str) -> str:
    """Tables of all points and of ucray's BD-rates, and what is missing."""
    lines = [f"# {title}", "", "Speeds in MB of the volume a second, on the threads named.", ""]
    lines += ["Seams: error beside faces of chunks against inside, its step across against within.", ""]
    lines += [
        "| codec | read alone | ratio | PSNR | SSIM | seams | encode | decode | threads | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for codec, curve in curves(bench.points).items():
        lines += [
            f"| {codec} | {p.cut} | {p.ratio:.1f} | {p.psnr:.2f} | {p.ssim:.3f} "
            f"| {p.seam_error:.3f}, {p.seam_step:.3f} | {p.encode_speed:.3g} "
            f"| {p.decode_speed:.3g} | {p.threads} | {p.note} |"
            for p in curve
        ]
    found = curves(bench.points)
    if "ucray" in found:
        lines += ["", "| ucray against | BD-rate (bytes at equal PSNR) |", "|---|---|"]
        for codec, curve in found.items():
            if codec != "ucray":
                rate = bd_rate(curve, found["ucray"])
                lines.append(f"| {codec} | {'not comparable' if rate is None else f'{rate:+.1f} %'} |")
    lines += ["", *(f"Missing: {codec}: {reason}." for codec, reason in bench.missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def _monotone(curve: Sequence[Point]) -> list[Point]:
    """Points by falling PSNR along rising ratio; what another point beats in both is left out."""
    kept: list[Point] = []
    for point in sorted(curve, key=lambda p: p.ratio, reverse=True):
        if math.isfinite(point.psnr) and (not kept or point.psnr > kept[-1].psnr):
            kept.append(point)
    return kept


def _plot(bench: Bench, place: Path, measure: str, label: str, title: str) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for codec, curve in curves(bench.points).items():
        ours = codec.startswith("ucray")
        axes.plot(
            [p.ratio for p in curve],
            [getattr(p, measure) for p in curve],
            marker="o",
            markersize=4,
            linewidth=2.5 if ours else 1.2,
            linestyle="--" if curve[0].cut == "chunks" and not ours else "-",
            label=codec,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("ratio (bytes of the volume over bytes coded)")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    names = [f"{measure}.png", f"{measure}.svg"]
    for name in names:
        figure.savefig(place / name, dpi=130)
    pyplot.close(figure)
    return names

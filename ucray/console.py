"""What people and scripts see of a job: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ucray.log import LOGGER, structured

if TYPE_CHECKING:
    # Whoever asks for --help does not wait for what a job needs.
    from ucray.cluster.telemetry import Event, Listener

LINE_SECONDS = 15.0
"""Between two lines of progress where there is no terminal, as in the log of a cluster job."""

IN_BYTES = ("compress", "verify", "decompress")
"""Stages whose progress is counted in bytes."""


@contextmanager
def progress(*, quiet: bool) -> Iterator[Listener]:
    """Shows the progress of jobs: bars on a terminal, log lines now and then elsewhere.

    A quiet job says nothing, unless its log was asked for as JSON. Standard output is for results: what
    libraries print while a job runs, as Ray does when a worker dies, goes to standard error.
    """
    console = Console(stderr=True)
    with redirect_stdout(sys.stderr):
        if structured() or not (quiet or console.is_terminal):
            yield Lines(_log)
        elif quiet:
            yield lambda event: None
        else:
            with _bars(console) as listen:
                yield listen


def _log(line: str, event: Event) -> None:
    figures = {"stage": event.stage, "done": event.done, "total": event.total, **event.figures}
    LOGGER.info(line, extra=figures)


@contextmanager
def _bars(console: Console) -> Iterator[Listener]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def listen(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, speed="", note="")
            task = bars.tasks[bars.task_ids.index(tasks[event.stage])]
            speed = _speed(event, task.elapsed or 0.0)
            bars.update(
                tasks[event.stage], completed=event.done, total=event.total, speed=speed, note=event.note
            )

        yield listen


class Lines:
    """A listener that writes a line when a stage begins, every LINE_SECONDS, and when it ends."""

    def __init__(
        self, write: Callable[[str, Event], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._now = now
        self._begun: dict[str, float] = {}
        self._shown = -math.inf

    def __call__(self, event: Event) -> None:
        now = self._now()
        first = event.stage not in self._begun
        begun = self._begun.setdefault(event.stage, now)
        if not (first or event.done >= event.total or now - self._shown >= LINE_SECONDS):
            return
        self._shown = now
        share = event.done / event.total if event.total else 1.0
        parts = [f"{event.stage} {share:.0%}", _speed(event, now - begun)]
        if 0.0 < share < 1.0 and now > begun:
            left = timedelta(seconds=round((now - begun) * (1.0 - share) / share))
            parts.append(f"{left} left")
        self._write(", ".join(part for part in (*parts, event.note) if part), event)


def _speed(event: Event, seconds: float) -> str:
    if event.stage not in IN_BYTES or not seconds or not event.done:
        return ""
    return f"{event.done / seconds / 1e6:.1f} MB/s"


def show(document: dict[str, Any], *, as_json: bool) -> None:
    """Print a result: a table for people, or one JSON document."""
    if as_json:
        print(json.dumps(_finite(document), indent=1))
        return
    table = Table(show_header=False, box=None)
    for name, value in document.items():
        table.add_row(name.replace("_", " "), _shown(value))
    Console().print(table)


def show_plan(document: dict[str, Any], *, as_json: bool) -> None:
    """Print a plan: what it would give and take, then the ways to keep the volume and what they cost."""
    if as_json:
        show(document, as_json=True)
        return
    ways, evens = document.pop("ways", {}), document.pop("break_even_months", {})
    choice = document.pop("choice", None)
    if choice is not None:
        _show_choice(choice)
    show({name: value for name, value in document.items() if value is not None}, as_json=False)
    if not ways:
        return
    table = Table(box=None)
    for title in ("keep as", "GB", "PSNR", "$ once", "$ a month", "$ in all", "ucray cheaper"):
        table.add_column(title, justify="left" if title == "keep as" else "right")
    for name, way in ways.items():
        figures = (way["bytes"] / 1e9, way["psnr"], way["once"], way["monthly"], way["total"])
        table.add_row(
            name, *(f"{figure:.4g}" for figure in figures), _from(evens[name]) if name in evens else ""
        )
    Console().print(table)


def _show_choice(choice: dict[str, Any]) -> None:
    """How a ratio was chosen: what codecs lose at those that were tried, and who else would do."""
    table = Table(box=None)
    codecs = list(dict.fromkeys(loss["codec"] for loss in choice["losses"]))
    for title in ("ratio", *(f"{codec} loses %" for codec in codecs)):
        table.add_column(title, justify="right")
    lost = {(loss["codec"], loss["wanted"]): loss["percent"] for loss in choice["losses"]}
    for wanted in sorted({loss["wanted"] for loss in choice["losses"]}):
        cells = (f"{lost[codec, wanted]:.1f}" if (codec, wanted) in lost else "" for codec in codecs)
        table.add_row(f"{wanted:g}", *cells)
    console = Console()
    console.print(table)
    console.print(f"chosen: ratio {choice['ratio']:g} (curve: {choice['curve']})", markup=False)
    for codec, ratio in choice["simpler"].items():
        console.print(f"{codec} is simpler and keeps as much up to a ratio of {ratio:g}", markup=False)


def _from(months: float | None) -> str:
    if months is None:
        return "never"
    return f"from {months:.3g} months" if months else "at once"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(entry) for entry in value) or "none"
    return str(value)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: an error-free volume's PSNR is null there."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

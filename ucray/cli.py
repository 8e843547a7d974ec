"""The command line: its commands, how it logs, and how it ends."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from ucray.commands import bench, plan, read, tracer, write
from ucray.errors import UcrayError
from ucray.log import LogFormat, LogLevel, configure

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

STOPPED = 128 + signal.SIGTERM
"""Exit status of a job that was told to stop, as shells say it."""

for command in (
    *(write.synth, write.train, tracer.tracer, write.compress, plan.plan, bench.bench, write.decompress),
    *(read.serve, read.report, read.verify, read.info),
):
    app.command()(command)


@app.callback()
def log_options(
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines, on standard error.", envvar="UCRAY_LOG_FORMAT")
    ] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="At debug each shard has a line.", envvar="UCRAY_LOG_LEVEL")
    ] = LogLevel.INFO,
) -> None:
    """Compress electron-microscopy volumes on Ray into archives that any zarr reader opens."""
    configure(log_format, log_level)


def main() -> None:
    """Entry point: errors of ours become one line and their exit status, and so does SIGTERM."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except UcrayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as ended:
        if ended.code == STOPPED:
            print("stopped; compress, and train with --storage, go on where they ended", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    # No error of ours: a worker's loop would take it for one of its shard.
    raise SystemExit(STOPPED)

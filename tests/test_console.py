"""Progress where there is no terminal: lines in the log of a cluster job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ucray
from ucray.cluster.telemetry import Event
from ucray.console import LINE_SECONDS, Lines, progress


def test_a_line_at_the_start_now_and_then_and_at_the_end() -> None:
    written: list[str] = []
    clock = 100.0
    lines = Lines(lambda line, event: written.append(line), lambda: clock)
    for second in range(61):
        clock = 100.0 + second
        lines(Event("compress", second * 1e6, 60e6, f"ratio {64 + second / 10:.1f}"))
    assert written[0] == "compress 0%, ratio 64.0"
    assert written[1] == f"compress 25%, 1.0 MB/s, 0:00:45 left, ratio {64 + LINE_SECONDS / 10:.1f}"
    assert written[-1] == "compress 100%, 1.0 MB/s, ratio 70.0"
    assert len(written) == 1 + 60 / LINE_SECONDS


def test_each_stage_has_its_lines() -> None:
    written: list[str] = []
    lines = Lines(lambda line, event: written.append(line), lambda: 0.0)
    for stage in ("measure", "train"):
        lines(Event(stage, 0, 2))
        lines(Event(stage, 1, 2))
        lines(Event(stage, 2, 2, "done"))
    assert written == ["measure 0%", "measure 100%, done", "train 0%", "train 100%, done"]


def test_what_others_print_during_a_job_does_not_get_among_its_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress(quiet=True):
        print("(raylet) a worker died")
    print("the result")
    assert capsys.readouterr() == ("the result\n", "(raylet) a worker died\n")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_job_without_a_terminal_says_how_far_it_is(
    quiet: bool, tmp_path: Path, tiny_weights: ucray.Weights
) -> None:
    (tmp_path / "tiny").write_bytes(tiny_weights.to_bytes())
    ucray.synth(str(tmp_path / "em.zarr"), (32, 32, 32))
    command = [str(Path(sys.executable).with_name("ucray")), "compress", "em.zarr", "em.ucray", "--serial"]
    command += ["--weights", "tiny", "--chunk", "32,32,32", "--ratio", "8", *["--json"] * quiet]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line.split(",")[0] for line in ended.stderr.splitlines()]
    assert lines == ([] if quiet else ["measure 50%", "measure 100%", "compress 0%", "compress 100%"])

"""A training run as a driver of its own, which notes every step that it hears of."""

from __future__ import annotations

import sys
from pathlib import Path

import ucray

SETTINGS = ucray.TrainingConfig(teacher_steps=500, student_steps=20, batch=1)


def main() -> None:
    source, target, init, storage, log = sys.argv[1:]

    def note(event: ucray.Event) -> None:
        with Path(log).open("a") as lines:
            lines.write(f"{int(event.done)}\n")

    ucray.train(source, target, SETTINGS, init=init, storage=storage, chunk=(32, 32, 32), listener=note)


if __name__ == "__main__":
    main()

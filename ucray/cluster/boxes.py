"""Lists of shards that failed: written by a job, read by the next one that does just these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ucray.cluster.plan import CompressPlan
from ucray.errors import SettingsError
from ucray.grid import Shape3, triple


def write_boxes(plan: CompressPlan, errors: Mapping[Shape3, str], path: str) -> str:
    """Write shards of a plan with their boxes in the source and what stopped them, as JSON; says where.

    Where the file cannot be written, it says why: what was lost is the list alone.
    """
    listed = [
        {"shard": list(index), "box": _box(plan, index), "error": error} for index, error in errors.items()
    ]
    try:
        Path(path).write_text(json.dumps(listed, indent=1) + "\n")
    except OSError as error:
        return f"and {path} cannot be written to list them ({error.strerror})"
    return f"listed in {path}"


def read_boxes(plan: CompressPlan, path: str) -> frozenset[Shape3]:
    """The shards that a file of `write_boxes` lists.

    Raises
    ------
    SettingsError
        If there is no such file, or it lists anything but shards of this plan.
    """
    try:
        listed = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SettingsError(f"--boxes {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"--boxes {path} is no JSON") from None
    try:
        found = {triple(int(n) for n in entry["shard"]): str(entry["box"]) for entry in listed}
    except (KeyError, TypeError, ValueError):
        raise SettingsError(f'--boxes {path} is no list of {{"shard": [z, y, x], "box": "..."}}') from None
    shards = plan.grid.shards
    for index, box in found.items():
        inside = all(0 <= i < n for i, n in zip(index, shards, strict=True))
        if not inside or _box(plan, index) != box:
            raise SettingsError(
                f"--boxes {path} lists shard {index} as {box}, which this job does not have: "
                "give the source and the settings of the job that wrote the file"
            )
    return frozenset(found)


def _box(plan: CompressPlan, index: Shape3) -> str:
    return str(plan.source_box(plan.grid.shard_box(index)))

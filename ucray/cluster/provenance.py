"""Where an archive comes from: the command and the versions that made it."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("ucray", "torch", "numpy", "zarr", "constriction", "ray")


def provenance() -> dict[str, Any]:
    """Command line, time (UTC) and versions of the process that begins an archive."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }

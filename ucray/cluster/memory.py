"""Peak resident memory of a process, as its kernel counted it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; shared memory that it looked at included."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # What a process inherited from the one that forked it counts here; Linux' own figure starts anew.
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

"""Log lines on standard error: text for people, or one JSON document a line for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping
from enum import StrEnum

from pythonjsonlogger.json import JsonFormatter

LOGGER = logging.getLogger("ucray")


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least important lines that are shown; each shard has one at DEBUG."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


def configure(form: LogFormat, level: LogLevel) -> None:
    """Send ucray's log lines to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json(job_id()) if form is LogFormat.JSON else logging.Formatter("%(message)s"))
    LOGGER.handlers = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(level.value.upper())


def structured() -> bool:
    """Whether log lines are JSON documents."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in LOGGER.handlers)


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """What tells this job's lines from another's: its id of `ray job submit`, or else one of its own."""
    metadata = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return str(metadata.get("job_submission_id") or uuid.uuid4().hex[:12])


def _json(job: str) -> logging.Formatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        static_fields={"job": job},
        timestamp="time",
    )

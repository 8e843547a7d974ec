"""Settings of jobs from the loose values of a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from ucray.cluster.pipeline import RunOptions
from ucray.cluster.plan import CompressOptions
from ucray.errors import SettingsError
from ucray.grid import parse_shape
from ucray.settings import Settings, TrainingConfig

Checked = TypeVar("Checked", bound=Settings)


def options_from(*, chunk: str | None = None, shard: str | None = None, **values: Any) -> CompressOptions:
    """Options of a compress job from loose values; raises SettingsError that names the wrong one."""
    shapes = {
        name: parse_shape(text) for name, text in (("chunk", chunk), ("shard", shard)) if text is not None
    }
    return checked(CompressOptions, values | shapes)


def run_options_from(**values: Any) -> RunOptions:
    """How a job runs, from loose values; raises SettingsError that names the wrong one."""
    return checked(RunOptions, values)


def training_from(**values: Any) -> TrainingConfig:
    """Training settings from loose values; raises SettingsError that names the wrong one."""
    return checked(TrainingConfig, values)


def training_for(steps: int) -> TrainingConfig:
    """Training whose teacher takes `steps` steps and whose student takes two for five of them."""
    return TrainingConfig(teacher_steps=steps, student_steps=max(1, steps * 2 // 5))


def checked(model: type[Checked], values: Mapping[str, Any]) -> Checked:
    """Settings from loose values; raises SettingsError that names the wrong one. None is the default."""
    try:
        return model(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise SettingsError(f"--{name} {first['input']}: {first['msg'].lower()}") from None

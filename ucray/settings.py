"""Frozen settings of jobs, checked where they enter: unknown names and wrong values are refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: immutable, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingConfig(Settings):
    """How long and on what to train.

    `teacher_steps` of stage 1 (rate-distortion) are followed by `student_steps` of stage 2
    (distillation); each step sees `batch` chunks per worker. A student that is not `taught` learns
    from the data alone. With `keep_stream` stage 1 teaches the decoders alone, on the stream as it is.
    """

    teacher_steps: Annotated[int, Field(ge=0)] = 1200
    student_steps: Annotated[int, Field(ge=1)] = 500
    batch: Annotated[int, Field(ge=1, le=4096)] = 2
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 3e-3
    taught: bool = True
    keep_stream: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

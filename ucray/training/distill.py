"""The two stages of training as one resumable run: rate-distortion, then distillation.

::

    Trainer --step--> stage 1: coder, teacher and student --freeze--> stage 2: student --> Weights
                      SOAP, warm-up and cosine                         the same

A Trainer knows nothing of Ray: `wrap` lets a distributed run put its own wrapper around the module
of each stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ucray.codec.conditioning import QualityAffine
from ucray.codec.lapping import Lapping
from ucray.codec.linear import LinearSynthesis, start_linear
from ucray.codec.network import stored_synthesis, synthesis_of
from ucray.codec.passes import Pass
from ucray.codec.postfilter import PostFilter
from ucray.codec.prior import ContextPrior
from ucray.codec.weights import Array, Weights
from ucray.config import CodecConfig
from ucray.errors import SettingsError, WeightsError
from ucray.settings import TrainingConfig
from ucray.training.calibrate import freeze, load_coder, to_weights
from ucray.training.lapping import start_lapping
from ucray.training.loss import Coder, Distillation, RateDistortion, draw_quality
from ucray.training.ordering import ORDER_CHUNKS, learn_passes
from ucray.training.prune import Networks, prune
from ucray.training.schedule import share_of_rate
from ucray.training.soap import Soap
from ucray.training.tiles import tile_seed
from ucray.training.widening import is_wider, start_rest, take_first

TABLE_SPEED = 10.0
"""Learning rate of what depends on the quality against the networks': an entry meets few of the chunks."""

FILTER_SPEED = 5.0
"""Of the post-filters, which start from noise behind a transform that works."""

LAPPING_SPEED = 0.3
"""Of the filters across cells, which start near their best."""

START_TILES = 32
"""Chunks from which the linear parts are started."""

REST_TILES = 64
"""Chunks from which latents that are added are started: what they stand for is nearly all noise."""

Figures = dict[str, Tensor]


class Trainer:
    """Trains a coder, a teacher and a student, step by step.

    Parameters
    ----------
    config, settings
        Shapes of the networks; steps, batch, learning rate, seed.
    start
        Weights to start from; their configuration must be the same but for the decoders: networks and
        post-filters that are of another size start anew, the student's as the teacher's where they are now
        as large. Where the stream is not kept, it may also lack the
        trellis that `config` has, and its order. It may lack the last groups of latents either way; what is
        kept then are the others.
    device
        Where the networks live.
    wrap
        Applied to the module of a stage before its first step (distributed data parallel).
    rank
        Worker number, so that workers draw different noise.
    """

    def __init__(
        self,
        config: CodecConfig,
        settings: TrainingConfig,
        *,
        start: Weights | None = None,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        rank: int = 0,
    ) -> None:
        if start is not None and not _goes_on(start.config, config, settings):
            raise SettingsError(
                "the weights to start from are of another configuration (anisotropy of the voxels, widths); "
                "train from nothing, or choose weights of a like volume"
            )
        torch.manual_seed(settings.seed)
        self.config = config
        self.settings = settings
        self.step_number = 0
        self._rank = rank
        self.device = torch.device(device)
        self.coder = Coder(config)
        self.teacher = synthesis_of(config, "teacher")
        self.student = synthesis_of(config, "student")
        self._distillation = Distillation(
            config, self.coder, self.teacher, self.student, taught=settings.taught
        )
        self._started = start is not None
        self._missing: list[Pass] = []
        self._kept_tensors: dict[str, Array] = {}
        self._known = config.latents if start is None else start.config.latents
        if start is not None and settings.keep_stream and self._known == config.latents:
            # What was counted stays too: chunks are the same to the byte.
            for part in ("stream", "analysis", "reference"):
                self._kept_tensors |= start.part(part, keep_prefix=True)
        if start is not None:
            self._missing = load_coder(start, self.coder)
            for part, decoder in (("teacher", self.teacher), ("student", self.student)):
                _start_scales(decoder, self.coder.analysis, stored_synthesis(start, "teacher"))
                # A student that is now as large as its teacher starts as it.
                for stored in ("teacher", part):
                    _start_like(decoder, stored_synthesis(start, stored))
        for module in (self.coder, self.teacher, self._distillation):
            module.to(self.device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._generator = torch.Generator(self.device).manual_seed(settings.seed * 4096 + rank)
        self._wrap = wrap
        self._stage = 0
        self._module: nn.Module = nn.Identity()
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.settings.teacher_steps + self.settings.student_steps

    @property
    def stage(self) -> int:
        """1 while the teacher learns, 2 while the student does."""
        return 1 if self.step_number < self.settings.teacher_steps else 2

    def step(self, batch: Tensor) -> Figures:
        """One step on normalised chunks (batch, 1, z, y, x); figures to log, numbers on the device.

        Nothing here waits for a GPU: who reads the figures does.
        """
        if self._missing or not self._started:
            raise SettingsError(
                "call start() with tiles, or give weights to start from, before the first step"
            )
        if self._stage != self.stage:
            self._enter(self.stage)
        assert self._optimizer is not None
        rate = self.settings.learning_rate * self._schedule()
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        x = batch.to(self.device).contiguous(memory_format=torch.channels_last_3d)
        quality = draw_quality(len(x), self._generator)
        loss, figures = self._module(x, quality, self._generator)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self.step_number += 1
        shown: Figures = {"loss": loss.detach(), **figures}
        return shown

    def start(self, draw: Callable[[int], Tensor]) -> None:
        """Start what needs chunks to start from: the linear parts, or the networks that loaded weights lack.

        `draw` gives as many chunks as it is asked for (batch, 1, z, y, x).
        """
        if self._missing:
            batches = (draw(START_TILES).to(self.device) for _ in range(ORDER_CHUNKS // START_TILES))
            # All workers draw alike: they get the same chunks, and end with the same networks.
            alike = torch.Generator(self.device).manual_seed(self.settings.seed)
            if self._known < self.config.latents:
                decoders = self.teacher, self.student
                start_rest(self.coder, decoders, self._known, draw(REST_TILES).to(self.device))
            learn_passes(self.coder, self._missing, self.config, batches, alike)
            self._missing = []
        if self._started:
            return
        x = draw(START_TILES).to(self.device)
        start_lapping(self.coder.analysis.lapped, self.teacher.lapped)
        start_linear(self.coder.analysis, self.teacher, x)
        self.coder.start(x, draw_quality(len(x), self._generator), self._generator)
        _start_linear_like(self.student, self.teacher)
        self._started = True

    def finish(self, batches: Sequence[Tensor], training: Mapping[str, Any]) -> Weights:
        """Weights after the last step, pruned and counted on `batches`."""
        freeze(self.coder)
        moved = [batch.to(self.device) for batch in batches]
        found = Networks(self.config, self.coder, self.teacher, self.student)
        # Nothing is learned any more: what the linear parts are multiplied with is made once.
        self._modules().eval()
        made = prune(found, moved, keep_coder=self.settings.keep_stream)
        weights = to_weights(made.config, made.coder, made.teacher, made.student, moved, training)
        self._modules().train()
        return Weights(weights.config, {**weights.tensors, **self._kept_tensors}, training)

    def to_bytes(self) -> bytes:
        """State of the run as a safetensors file, for a checkpoint."""
        tensors = {f"module.{name}": value for name, value in self._modules().state_dict().items()}
        tensors["generator"] = self._generator.get_state()
        if self._optimizer is not None:
            for index, entry in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        header = json.dumps({"step": self.step_number, "stage": self._stage})
        return bytes(save(tensors, metadata={"trainer": header}))

    def from_bytes(self, data: bytes) -> None:
        """Go on from `to_bytes` of a run with the same settings; raises WeightsError if it is none."""
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["trainer"])
            prefix = "module."
            self._modules().load_state_dict(
                {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            )
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise WeightsError(
                f"the checkpoint does not fit this run: {' '.join(str(error).split())}"
            ) from None
        self._started, self._missing = True, []
        self.step_number = int(header["step"])
        if header["stage"]:
            self._enter(int(header["stage"]), resumed=True)
            assert self._optimizer is not None
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    state.setdefault(int(index), {})[key] = value
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self._rank == 0:
            self._generator.set_state(tensors["generator"])
        else:
            # The state is that of the first worker; others go on with noise of their own.
            self._generator.manual_seed(tile_seed(self.settings.seed, self._rank, self.step_number))

    def _enter(self, stage: int, *, resumed: bool = False) -> None:
        self._stage = stage
        module: nn.Module
        if stage == 1:
            keep = self.settings.keep_stream
            if keep:
                freeze(self.coder)
            module = RateDistortion(self.coder, self.teacher, self.student, keep_stream=keep)
        else:
            if not resumed:
                freeze(self.coder)
            self.coder.requires_grad_(False)
            self.teacher.requires_grad_(False)
            module = self._distillation
        tables = [p for m in module.modules() for p in _tables(m)]
        lapping = [p for m in module.modules() if isinstance(m, Lapping) for p in m.parameters()]
        filters = [
            parameter
            for m in module.modules()
            if isinstance(m, PostFilter)
            for layer in m.modules()
            if isinstance(layer, nn.Conv3d)
            for parameter in layer.parameters()
        ]
        apart = {id(parameter) for parameter in tables + lapping + filters}
        others = [parameter for parameter in module.parameters() if id(parameter) not in apart]
        plain = {"weight_decay": 0.0, "turned": False}
        groups: list[dict[str, Any]] = [
            {"params": others, "speed": 1.0},
            {"params": filters, "speed": FILTER_SPEED},
            {"params": tables, "speed": TABLE_SPEED, **plain},
            {"params": lapping, "speed": LAPPING_SPEED, **plain},
        ]
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._optimizer = Soap(groups, lr=self.settings.learning_rate)
        self._module = self._wrap(module)

    def _schedule(self) -> float:
        """Share of the learning rate at this step of the current stage."""
        if self.stage == 1:
            return share_of_rate(self.step_number, self.settings.teacher_steps)
        return share_of_rate(self.step_number - self.settings.teacher_steps, self.settings.student_steps)

    def _modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.coder, self.teacher, self._distillation])


def _lasting(config: CodecConfig, settings: TrainingConfig) -> CodecConfig:
    """What training cannot change: decoders start anew, trellis and order are new with new counts."""
    lasting = replace(config, teacher=None, student=None, teacher_filter=None, student_filter=None)
    if settings.keep_stream:
        return lasting
    return replace(lasting, first_dependent=None, interlaced=False, trellis_states=8)


def _goes_on(start: CodecConfig, config: CodecConfig, settings: TrainingConfig) -> bool:
    """Whether weights of a configuration can be trained on as another."""
    wider = replace(start, groups=config.groups) if is_wider(config, start) else start
    return _lasting(wider, settings) == _lasting(config, settings)


def _start_like(decoder: LinearSynthesis, stored: LinearSynthesis) -> None:
    """Give a decoder what stored weights have for it: its linear part, and what of the rest is as large."""
    _start_linear_like(decoder, stored)
    state, found = decoder.state_dict(), stored.state_dict()
    for filtering in (False, True):
        mine, theirs = (
            {name: value for name, value in one.items() if name.startswith("postfilter.") == filtering}
            for one in (state, found)
        )
        if {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in theirs.items()}:
            state |= theirs
    decoder.load_state_dict(state)


def _start_scales(network: nn.Module, *others: nn.Module) -> None:
    """Give a network the scales of its inputs and outputs that others know; the last one counts."""
    with torch.no_grad():
        for other in others:
            scales = dict(other.named_buffers(recurse=False))
            mine = dict(network.named_buffers(recurse=False))
            take_first(mine, {n: s for n, s in scales.items() if n in mine and n.endswith("_scale")})


def _start_linear_like(student: LinearSynthesis, other: LinearSynthesis) -> None:
    """Give a student another synthesis' linear part and scales: what is linear needs no teaching."""
    _start_scales(student, other)
    for name in ("linear", "rescaled", "lapped"):
        take_first(getattr(student, name).state_dict(), getattr(other, name).state_dict())


def _tables(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module itself that are looked up by quality or by latent, not multiplied by."""
    if isinstance(module, QualityAffine):
        return [module.scale, module.shift]
    if isinstance(module, ContextPrior):
        return [module.base, module.log_gain]
    return []

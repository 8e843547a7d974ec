"""Training: both stages learn, a run goes on from its checkpoint, weights come out whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from ucray.codec.context import FEATURE_UNITS, LARGEST_FEATURE, LARGEST_STEP
from ucray.codec.prior import ContextPrior, lambda_of, rate_in_bits
from ucray.codec.weights import Weights
from ucray.config import QUALITIES, CodecConfig, SynthesisConfig
from ucray.errors import SettingsError, SourceError, WeightsError
from ucray.settings import TrainingConfig
from ucray.synthetic import synthetic_volume
from ucray.training.distill import Trainer
from ucray.training.loss import draw_quality
from ucray.training.tiles import TileSampler, prepare_tiles, tile_seed

SETTINGS = TrainingConfig(teacher_steps=14, student_steps=10, batch=4, learning_rate=3e-3)
CHUNK = (32, 32, 32)


@pytest.fixture
def sampler(smooth_volume: Callable[..., Any], tiny_config: CodecConfig) -> Callable[[], TileSampler]:
    """Samplers that start over with the same crops."""
    noise = np.random.default_rng(1).normal(0, 0.3, (64, 64, 64))
    tiles = prepare_tiles([smooth_volume((64, 64, 64), 3) + noise], np.nan, 0.0, 1.0)
    return lambda: TileSampler(tiles, CHUNK, tiny_config, 0)


def _run(trainer: Trainer, sampler: TileSampler, steps: int) -> list[dict[str, float]]:
    found = [trainer.step(sampler.draw(SETTINGS.batch)) for _ in range(steps)]
    return [{name: float(value) for name, value in figures.items()} for figures in found]


def test_both_stages_learn(tiny_config: CodecConfig) -> None:
    """On one batch of cells and membranes: both losses fall, and the student reaches the teacher."""
    volume = synthetic_volume((32, 64, 64), 1, padding=0)
    tiles = prepare_tiles([volume], np.nan, float(volume.mean()), float(volume.std()))
    batch = TileSampler(tiles, CHUNK, tiny_config, 0).draw(4)
    settings = TrainingConfig(teacher_steps=80, student_steps=40, learning_rate=4e-3)
    trainer = Trainer(tiny_config, settings)
    trainer.start(lambda count: batch)
    teacher = [trainer.step(batch)["loss"] for _ in range(80)]
    assert np.mean(teacher[-10:]) < 0.95 * np.mean(teacher[:10])
    student = [trainer.step(batch) for _ in range(40)]
    # Each step draws its qualities anew, so losses jump; against the teacher the student only gains.
    behind = [figures["mse"] / figures["teacher_mse"] for figures in student]
    assert np.mean(behind[-10:]) < np.mean(behind[:4])
    assert np.mean(behind[-10:]) < 1.1


def test_stage_two_leaves_the_stream_alone(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig
) -> None:
    draws = sampler()
    digests = []
    for steps in (1, 6):
        trainer = Trainer(tiny_config, SETTINGS.model_copy(update={"student_steps": steps}))
        draws = sampler()
        trainer.start(draws.draw)
        _run(trainer, draws, trainer.total_steps)
        calibration = [torch.zeros(1, 1, *CHUNK)]
        digests.append(trainer.finish(calibration, {}).stream_digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("stop", [5, 14, 18], ids=["stage 1", "between", "stage 2"])
def test_a_run_goes_on_from_its_checkpoint(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig, stop: int
) -> None:
    whole, draws = Trainer(tiny_config, SETTINGS), sampler()
    whole.start(lambda count: draws.draw(8))
    expected = _run(whole, draws, whole.total_steps)
    first, draws = Trainer(tiny_config, SETTINGS), sampler()
    first.start(lambda count: draws.draw(8))
    _run(first, draws, stop)
    second = Trainer(tiny_config, SETTINGS)
    second.from_bytes(first.to_bytes())
    assert second.step_number == stop
    assert _run(second, draws, whole.total_steps - stop) == expected[stop:]


def test_workers_that_go_on_draw_noise_of_their_own(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig
) -> None:
    """The first worker's state is all there is: others would draw as it does, to the end."""
    first, draws = Trainer(tiny_config, SETTINGS), sampler()
    first.start(lambda count: draws.draw(8))
    _run(first, draws, 2)
    noise = []
    for rank in (0, 1, 2, 1):
        worker = Trainer(tiny_config, SETTINGS, rank=rank)
        worker.from_bytes(first.to_bytes())
        noise.append(torch.rand(8, generator=worker._generator))
    assert torch.equal(noise[0], torch.rand(8, generator=first._generator))
    assert torch.equal(noise[1], noise[3])
    assert not any(torch.equal(noise[a], noise[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_foreign_checkpoint_is_refused(tiny_config: CodecConfig) -> None:
    with pytest.raises(WeightsError):
        Trainer(tiny_config, SETTINGS).from_bytes(b"nothing")
    with pytest.raises(WeightsError):
        Trainer(CodecConfig(), SETTINGS).from_bytes(Trainer(tiny_config, SETTINGS).to_bytes())


@pytest.fixture
def unpruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps make no network that adds anything; keep them all."""
    monkeypatch.setattr("ucray.training.prune.TOLERANCE", -math.inf)


@pytest.mark.usefixtures("unpruned")
def test_the_teacher_of_one_domain_teaches_the_student_of_another(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig, tiny_weights: Weights
) -> None:
    settings = TrainingConfig(teacher_steps=0, student_steps=6)
    trainer = Trainer(tiny_config, settings, start=tiny_weights)
    assert trainer.stage == 2
    _run(trainer, sampler(), 6)
    made = trainer.finish([torch.zeros(1, 1, *CHUNK)], {"start": tiny_weights.digest})
    for name, array in tiny_weights.part("teacher").items():
        np.testing.assert_array_equal(made.part("teacher")[name], array)
    changed = [
        name for name, array in tiny_weights.part("student").items()
        if not np.array_equal(made.part("student")[name], array)
    ]  # fmt: skip
    assert changed
    for table in ("step", "unit", "base", "gain", "codebook"):
        np.testing.assert_array_equal(made.part("stream")[table], tiny_weights.part("stream")[table])


@pytest.mark.usefixtures("unpruned")
def test_a_stream_that_is_kept_codes_the_same_bytes(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig, tiny_weights: Weights
) -> None:
    settings = TrainingConfig(teacher_steps=3, student_steps=2, keep_stream=True)
    trainer = Trainer(tiny_config, settings, start=tiny_weights)
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    _run(trainer, sampler(), 3)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.teacher.state_dict().items())
    _run(trainer, sampler(), 2)
    made = trainer.finish([torch.zeros(1, 1, *CHUNK)], {})
    for name, array in tiny_weights.tensors.items():
        if name.startswith(("stream.", "analysis.", "reference.")):
            np.testing.assert_array_equal(made.tensors[name], array, err_msg=name)


@pytest.mark.usefixtures("unpruned")
def test_a_student_of_another_size_starts_with_the_linear_part_of_the_one_before(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig, tiny_weights: Weights
) -> None:
    config = replace(tiny_config, student=SynthesisConfig.parse("8,1,4,1,4"))
    assert config.student != tiny_config.student
    trainer = Trainer(config, TrainingConfig(teacher_steps=0, student_steps=3), start=tiny_weights)
    stored = tiny_weights.network("student")
    for name, value in trainer.student.state_dict().items():
        if name.startswith(("linear", "lapped", "rescaled")) or name.endswith("_scale"):
            torch.testing.assert_close(value, torch.from_numpy(stored[name]), rtol=0, atol=0)
    _run(trainer, sampler(), 3)
    made = Weights.from_bytes(trainer.finish([torch.zeros(1, 1, *CHUNK)], {}).to_bytes())
    assert made.config == config
    for name, array in tiny_weights.part("teacher").items():
        np.testing.assert_array_equal(made.part("teacher")[name], array)


@pytest.mark.parametrize(("worse", "heard"), [("student", True), ("teacher", False)])
def test_a_student_hears_its_teacher_where_that_is_ahead(
    worse: str,
    heard: bool,
    sampler: Callable[[], TileSampler],
    tiny_config: CodecConfig,
    tiny_weights: Weights,
) -> None:
    upside_down = {
        name: np.negative(value) if name == f"{worse}.linear.weight" else value
        for name, value in tiny_weights.tensors.items()
    }
    students = []
    for taught in (True, False):
        settings = TrainingConfig(teacher_steps=0, student_steps=4, taught=taught)
        trainer = Trainer(tiny_config, settings, start=Weights(tiny_config, upside_down))
        _run(trainer, sampler(), 4)
        made = trainer.finish([torch.zeros(1, 1, *CHUNK)], {})
        students.append({name: array.tobytes() for name, array in made.part("student").items()})
    assert (students[0] != students[1]) is heard


def test_a_latent_whose_gain_ran_away_costs_nobody_the_training(
    sampler: Callable[[], TileSampler], tiny_config: CodecConfig, tiny_weights: Weights
) -> None:
    """Its step would be wider than weights may say; it is cut off, and the latent stays silent."""
    trainer = Trainer(tiny_config, SETTINGS, start=tiny_weights)
    with torch.no_grad():
        trainer.coder.prior.log_gain[0, -1] = trainer.coder.prior.log_gain[:, -1].max() - 30.0
    step = trainer.finish([sampler().draw(2)], {}).stream.context.step
    assert step[0, -1] == step.max() == LARGEST_STEP


def test_training_sees_features_as_coding_does(tiny_config: CodecConfig) -> None:
    """Codebook vectors and latents far beyond what a feature may be, and qualities between units."""
    torch.manual_seed(0)
    prior = ContextPrior(tiny_config)
    for network in prior.networks:
        torch.nn.init.normal_(list(network.parameters())[-2], std=0.3)
    y = torch.randn(1, tiny_config.latents, 4, 4, 4)
    vectors = 5.0 * torch.randn(1, tiny_config.code_width, 2, 2, 2)
    quality = torch.tensor([128.0])
    limit = LARGEST_FEATURE / FEATURE_UNITS
    cut = (vectors * FEATURE_UNITS).round().clamp(-LARGEST_FEATURE, LARGEST_FEATURE) / FEATURE_UNITS
    assert (prior(y, cut, quality).bits == prior(y, vectors, quality).bits).all()
    far = prior(y, vectors.sign() * 1e6, quality).bits
    assert (far == prior(y, vectors.sign() * limit, quality).bits).all()
    assert (far != prior(y, cut, quality).bits).all()
    # A thirty-second of the range is one unit: 128.0 and 128.4 lie in the same.
    with torch.no_grad():
        prior.log_gain.zero_()
    near = prior(y, cut, torch.tensor([128.4])).bits
    assert (near == prior(y, cut, quality).bits).all()


def test_codebook_vectors_learn_through_the_rounding_of_features(tiny_config: CodecConfig) -> None:
    prior = ContextPrior(tiny_config)
    vectors = torch.randn(1, tiny_config.code_width, 2, 2, 2, requires_grad=True)
    prior(torch.randn(1, tiny_config.latents, 4, 4, 4), vectors, torch.tensor([100.0])).bits.sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad != 0).any()


def test_weights_of_another_shape_cannot_start_a_run(tiny_weights: Weights) -> None:
    with pytest.raises(SettingsError, match="another configuration"):
        Trainer(CodecConfig(), SETTINGS, start=tiny_weights)


def test_a_run_must_be_started(tiny_config: CodecConfig) -> None:
    with pytest.raises(SettingsError, match="start"):
        Trainer(tiny_config, SETTINGS).step(torch.zeros(1, 1, *CHUNK))


def test_qualities_spread_over_the_whole_range() -> None:
    drawn = draw_quality(8, torch.Generator().manual_seed(0))
    width = (QUALITIES - 1) / 8
    assert sorted(int(q / width) for q in drawn.tolist()) == list(range(8))


def test_lambda_falls_with_quality() -> None:
    values = [lambda_of(q) for q in range(QUALITIES)]
    assert values == sorted(values, reverse=True)


def test_the_rate_is_that_of_a_logistic() -> None:
    values = torch.arange(-200, 201, dtype=torch.float32)
    for log_scale in (-2.0, 0.0, 3.0):
        bits = rate_in_bits(values, torch.full_like(values, log_scale))
        # Probabilities of all symbols add up to one; the tails beyond 200 hold less than 1e-4.
        assert torch.exp2(-bits.double()).sum().item() == pytest.approx(1.0, abs=1e-4)
        assert bits.argmin().item() == 200


def test_tiles_of_padding_are_left_out_and_padding_is_filled_in() -> None:
    tissue = np.full((16, 16, 16), 100, np.uint8)
    tissue[:4] = 0
    empty = np.zeros((16, 16, 16), np.uint8)
    (tile,) = prepare_tiles([empty, tissue], 0.0, 100.0, 10.0)
    np.testing.assert_array_equal(tile, np.zeros((16, 16, 16), np.float16))
    with pytest.raises(SourceError, match="nothing but fill"):
        prepare_tiles([empty], 0.0, 0.0, 1.0)


def test_crops_turn_only_along_axes_that_are_alike() -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.float16)[:, None, None], (8, 32, 32)).copy()
    config = CodecConfig(levels=(0, 2, 2), latent_stride=(1, 2, 2))
    batch = TileSampler([ramp], (8, 32, 32), config, 0).draw(16)
    assert torch.all(batch == batch[:, :, :, :1, :1])
    # Contrast and brightness vary: a crop is its tile, scaled and shifted, not a step more.
    steps = batch[:, 0, :, 0, 0].diff(dim=1).abs()
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=0, atol=1e-5)
    assert 0.02 < float(steps[:, 0].std()) < 0.3
    isotropic = TileSampler([np.zeros((40, 40, 40), np.float16)], (32, 32, 32), CodecConfig(), 0)
    assert isotropic.draw(3).shape == (3, 1, 32, 32, 32)


def test_no_two_workers_and_no_two_resumed_runs_draw_alike() -> None:
    """A seed that is negative would end the run; a hash was, every other time."""
    seeds = [tile_seed(seed, rank, step) for seed in range(3) for rank in range(3) for step in (0, 200, 6400)]
    assert len(set(seeds)) == len(seeds)
    drawn = {tuple(np.random.default_rng(seed).integers(1 << 62, size=2)) for seed in seeds}
    assert len(drawn) == len(seeds)

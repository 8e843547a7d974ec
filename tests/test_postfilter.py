"""The post-filter: what it may do to a chunk, how it is trained, stored and left out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import TINY, TINY_ANISOTROPIC, build_weights, smooth_volume_of
from msgspec.structs import replace
from safetensors.numpy import save
from torch import Tensor
from typer.testing import CliRunner

import ucray
from ucray.cli import app
from ucray.codec import postfilter
from ucray.codec.chunk import ChunkFormat
from ucray.codec.conditioning import KEPT, QualityAffine
from ucray.codec.convolution import Convolution
from ucray.codec.decoder import ChunkDecoder
from ucray.codec.encoder import ChunkEncoder
from ucray.codec.linear import LinearSynthesis
from ucray.codec.network import stored_synthesis
from ucray.codec.postfilter import PLANES, PostFilter
from ucray.codec.weights import FORMAT, Weights
from ucray.config import CodecConfig, DecoderSizes, FilterConfig, config_for_voxels
from ucray.errors import ArchiveError, SettingsError, WeightsError
from ucray.grid import Shape3
from ucray.settings import TrainingConfig
from ucray.training.distill import Trainer
from ucray.training.loss import frozen_stream
from ucray.training.prune import Networks, prune, without
from ucray.training.tiles import TileSampler, prepare_tiles
from ucray.zarr_codec import UcrayCodec

SIZES = FilterConfig(width=8, layers=3)
CELLS = FilterConfig(width=12, layers=4, cell=(2, 4, 4))
BOTH = pytest.mark.parametrize("sizes", [SIZES, CELLS], ids=["one by one", "in pairs"])
CHUNK = (32, 32, 32)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may depend on whether the processor has units for bfloat16."""
    monkeypatch.setattr(postfilter, "fast_in_bfloat16", lambda: False)


def stirred(module: torch.nn.Module) -> None:
    """Give layers that start at zero something to say."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for part in module.modules():
            if isinstance(part, QualityAffine):
                part.scale.normal_(std=0.2)
                part.shift.normal_(std=0.05)
            if isinstance(part, PostFilter):
                part.leave.weight.normal_(std=0.1)


@BOTH
@pytest.mark.parametrize("config", [TINY, TINY_ANISOTROPIC], ids=["isotropic", "anisotropic"])
def test_a_new_filter_changes_nothing(config: CodecConfig, sizes: FilterConfig) -> None:
    x = torch.from_numpy(smooth_volume_of(CHUNK, 1))[None, None]
    with torch.no_grad():
        assert torch.equal(PostFilter(config, sizes)(x, torch.tensor([77.0])), x)


@pytest.mark.parametrize(
    ("config", "sizes", "step"),
    [(TINY, SIZES, (2, 2, 2)), (TINY_ANISOTROPIC, SIZES, (1, 2, 2)), (TINY, CELLS, (2, 4, 4))],
)
def test_it_is_the_same_at_every_cell_and_sees_as_far_as_it_says(
    config: CodecConfig, sizes: FilterConfig, step: Shape3
) -> None:
    """Moved by a cell, what comes out moves with it; a voxel beyond its reach says nothing."""
    network = PostFilter(config, sizes)
    stirred(network)
    x = torch.from_numpy(smooth_volume_of((72, 72, 72), 1))[None, None]
    quality = torch.tensor([77.0])
    far = x.clone()
    far[..., 0, 0, 0] += 5.0
    with torch.no_grad():
        y, moved, other = (network(one, quality) for one in (x, x.roll(step, (2, 3, 4)), far))
    inside = (slice(None), slice(None), *[slice(24, -24)] * 3)
    torch.testing.assert_close(moved[inside], y.roll(step, (2, 3, 4))[inside], rtol=0, atol=1e-5)
    assert (y - x).abs().max() > 0.01
    # A cell for each of the planes that an axis lies in, of one more in turn than there are layers.
    changed = (other != y)[0, 0].nonzero().amax(dim=0)
    planes = [PLANES[n % 3] for n in range(sizes.layers + 1)]
    reach = [sum(plane[axis] // 2 for plane in planes) for axis in range(3)]
    assert [int(n) < (1 + far) * s for n, far, s in zip(changed, reach, step, strict=True)] == [True] * 3


@BOTH
def test_one_chunk_is_filtered_as_among_others(sizes: FilterConfig) -> None:
    """Alone, the quality is folded into the weights; in a batch it is not."""
    network = PostFilter(TINY, sizes)
    stirred(network)
    x = torch.from_numpy(np.stack([smooth_volume_of(CHUNK, seed) for seed in (1, 2)]))[:, None]
    quality = torch.tensor([3.0, 200.0])
    with torch.no_grad():
        both = network(x, quality)
        for n in range(2):
            alone = network(x[n : n + 1], quality[n : n + 1])
            torch.testing.assert_close(alone, both[n : n + 1], rtol=0, atol=1e-5)
    assert (network(x, quality.flip(0)) - both).abs().max() > 0.01


@BOTH
def test_in_bfloat16_it_says_nearly_the_same(sizes: FilterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single chunk, without gradients, on a processor that is fast at it."""
    network = PostFilter(TINY, sizes)
    stirred(network)
    x = torch.from_numpy(smooth_volume_of(CHUNK, 1))[None, None]
    quality = torch.tensor([77.0])
    learning = network(x, quality).detach()
    with torch.no_grad():
        change = network(x, quality) - x
        monkeypatch.setattr(postfilter, "fast_in_bfloat16", lambda: True)
        # oneDNN has bfloat16 on few processors, PyTorch itself on all.
        monkeypatch.setattr("ucray.codec.convolution._ONE_DNN", False)
        fewer = network(x, quality)
    assert fewer.dtype == torch.float32
    difference = (fewer - x - change).abs().max()
    # Eight bits of each of five layers' features.
    assert 0.0 < difference < 5 * 2.0**-8 * change.abs().max()
    torch.testing.assert_close(network(x, quality).detach(), learning, rtol=0, atol=1e-6)


def test_a_version_that_is_not_that_of_its_contents_is_refused(filtered_weights: Weights) -> None:
    header = {"config": filtered_weights.config.to_json(), "training": {}}
    data = bytes(save(dict(filtered_weights.tensors), metadata={f"{FORMAT}-1": json.dumps(header)}))
    with pytest.raises(WeightsError, match="does not parse"):
        Weights.from_bytes(data)
    stored = UcrayCodec(filtered_weights, 0.0, 1.0, 100).to_dict()
    assert stored["configuration"]["version"] == 2
    assert UcrayCodec.from_dict(stored).weights.digest == filtered_weights.decoder().digest
    stored["configuration"]["version"] = 1
    with pytest.raises(ArchiveError, match="not that of its weights"):
        UcrayCodec.from_dict(stored)


@pytest.mark.parametrize("sizes", [FilterConfig(4096, 64), FilterConfig(4096, 0), FilterConfig(256, 3)])
def test_a_filter_far_larger_than_its_tensors_is_never_built(
    filtered_weights: Weights, sizes: FilterConfig
) -> None:
    config = replace(filtered_weights.config, student_filter=sizes)
    with pytest.raises(WeightsError, match=r"does not fit its configuration|more than 64 features a voxel"):
        stored_synthesis(Weights(config, filtered_weights.tensors), "student")


@pytest.mark.parametrize("training", [True, False])
def test_fine_qualities_are_not_filtered(training: bool) -> None:
    """Chunk by chunk; where it learns, the parameters have gradients all the same."""
    network = LinearSynthesis(TINY, replace(SIZES, finest=99)).train(training)
    stirred(network)
    x = torch.from_numpy(np.stack([smooth_volume_of(CHUNK, seed) for seed in (1, 2)]))[:, None]
    found = network.filtered(x, torch.tensor([99.0, 100.0]))
    assert (found[0] - x[0]).abs().max() > 0.01
    assert torch.equal(found[1], x[1])
    alone = network.filtered(x[1:], torch.tensor([100.0]))
    assert torch.equal(alone, x[1:])
    assert alone.requires_grad is training


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_decoder_filters_what_it_decodes(
    part: str, filtered_weights: Weights, chunk_format: Callable[[str], ChunkFormat]
) -> None:
    """Bytes through the stored filter are what the linear part and the filter give, one after the other."""
    chunk = replaced(chunk_format("float32"), shape=CHUNK, offset=0.0, scale=1.0)
    voxels = smooth_volume_of(CHUNK, 7)
    encoder = ChunkEncoder(filtered_weights, chunk)
    packed = encoder.encode(voxels, 150)
    found = ChunkDecoder(filtered_weights, chunk, part=part).decode(packed.data).astype(np.float32)
    plain = copy.deepcopy(stored_synthesis(filtered_weights, part)).eval()
    network = plain.postfilter
    plain.postfilter = None
    unfiltered = ChunkDecoder(filtered_weights, chunk, part=part)
    unfiltered.__dict__["synthesis"] = plain
    before = torch.from_numpy(unfiltered.decode(packed.data).astype(np.float32))[None, None]
    assert network is not None
    with torch.no_grad():
        expected = network(before, torch.tensor([150.0]))[0, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - before[0, 0].numpy()).max() > 0.01
    # The error that an archive states is that of the voxels that its readers get.
    if part == "student":
        assert packed.error.mse == pytest.approx(float(np.square(found - voxels).mean()), rel=1e-5)


def test_an_archive_is_read_with_its_filter(tmp_path: Path, filtered_weights: Weights) -> None:
    source, archive, file = (str(tmp_path / name) for name in ("em.zarr", "em.ucray", "w.safetensors"))
    Path(file).write_bytes(filtered_weights.to_bytes())
    ucray.synth(source, (32, 64, 64), seed=1)
    options = ucray.CompressOptions(psnr=20, chunk=(32, 32, 32), shard=(32, 64, 64))
    ucray.compress(source, archive, options, weights=file, run_options=ucray.RunOptions(serial=True))
    assert ucray.verify(archive, source, serial=True).clean
    metadata = json.loads((tmp_path / "em.ucray/0/zarr.json").read_text())
    inner = metadata["codecs"][0]["configuration"]["codecs"][0]["configuration"]
    assert inner["version"] == 2
    array: Any = zarr.open_group(archive, mode="r")["0"]
    voxels: Any = zarr.open_group(source, mode="r")["0"]
    error = float(np.square(array[:].astype(float) - voxels[:]).mean())
    # The statistics keep four digits.
    assert ucray.info(archive)["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


def blocks() -> list[Tensor]:
    """Two batches of cells with sharp walls, which a coarse linear code blurs."""
    tiles = prepare_tiles([np.sign(smooth_volume_of((64, 64, 64), 3))], np.nan, 0.0, 1.0)
    sampler = TileSampler(tiles, CHUNK, TINY, 0)
    return [sampler.draw(2) for _ in range(2)]


def test_it_learns_from_frozen_streams_what_stays_in_and_what_goes() -> None:
    """Decoders without networks: the student's filter is trained and helps, the teacher's is noise."""
    sizes = FilterConfig(16, 3)
    config = replace(TINY, teacher=None, student=None, teacher_filter=SIZES, student_filter=sizes)
    settings = TrainingConfig(teacher_steps=0, student_steps=60, learning_rate=5e-3, taught=False)
    batches = blocks()
    trainer = Trainer(config, settings)
    trainer.start(lambda count: torch.cat(batches)[:count])
    with torch.no_grad():
        before = _error(trainer, batches)
        for _ in range(60):
            with torch.enable_grad():
                trainer.step(torch.cat(batches))
        assert _error(trainer, batches) < 0.9 * before
    assert trainer.teacher.postfilter is not None
    with torch.no_grad():
        trainer.teacher.postfilter.leave.weight.normal_(std=0.1)
    made = prune(Networks(config, trainer.coder, trainer.teacher, trainer.student), batches)
    assert made.config.student_filter == sizes
    assert made.config.teacher_filter is None
    assert made.teacher.postfilter is None


def _error(trainer: Trainer, batches: list[Tensor]) -> float:
    """The student's squared error at a coarse quality."""
    total = 0.0
    for x in batches:
        quality = torch.full((len(x),), 60.0)
        stream = frozen_stream(trainer.coder, trainer.student, x, quality)
        total += float((trainer.student(stream.y_hat, stream.prior, quality) - x).square().mean())
    return total


def test_weights_without_a_filter_are_given_one_that_starts_as_no_change() -> None:
    plain = build_weights(TINY, seed=1)
    sizes = DecoderSizes(student_filter=SIZES)
    config = sizes.given_to(plain.config)
    assert (config.student_filter, config.teacher_filter) == (SIZES, None)
    trainer = Trainer(config, TrainingConfig(teacher_steps=0, student_steps=1), start=plain)
    assert trainer.student.postfilter is not None
    old: LinearSynthesis = stored_synthesis(plain, "student")
    y_hat, prior, quality = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 4, 2, 2, 2), torch.tensor([9.0])
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.student(y_hat, prior, quality), old(y_hat, prior, quality), rtol=0, atol=1e-5
        )


def test_another_filter_takes_the_place_of_one_of_another_size(filtered_weights: Weights) -> None:
    """Networks of the same size go on, the filter begins anew; one of the same size goes on too."""
    config = replace(filtered_weights.config, student_filter=FilterConfig(4, 1))
    trainer = Trainer(config, TrainingConfig(teacher_steps=0, student_steps=1), start=filtered_weights)
    assert trainer.student.postfilter is not None
    assert not trainer.student.postfilter.leave.weight.any()
    stored = filtered_weights.network("student")
    state = trainer.student.state_dict()
    for name, array in stored.items():
        if not name.startswith("postfilter."):
            np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)
    teacher = trainer.teacher.state_dict()
    for name, array in filtered_weights.network("teacher").items():
        np.testing.assert_array_equal(teacher[name].numpy(), array, err_msg=name)


def test_a_filter_that_is_as_large_as_the_teachers_starts_as_it(filtered_weights: Weights) -> None:
    teachers = filtered_weights.config.teacher_filter
    assert teachers != filtered_weights.config.student_filter
    config = replace(filtered_weights.config, student_filter=teachers)
    trainer = Trainer(config, TrainingConfig(teacher_steps=0, student_steps=1), start=filtered_weights)
    state = trainer.student.state_dict()
    for part, filtering in (("teacher", True), ("student", False)):
        for name, array in filtered_weights.network(part).items():
            if name.startswith("postfilter.") == filtering:
                np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


def test_without_takes_out_one_thing_alone(filtered_weights: Weights) -> None:
    trainer = Trainer(
        filtered_weights.config, TrainingConfig(teacher_steps=0, student_steps=1), start=filtered_weights
    )
    found = Networks(filtered_weights.config, trainer.coder, trainer.teacher, trainer.student)
    made = without(found, "student", "student_filter")
    assert made.config == replace(found.config, student_filter=None)
    assert made.student.state_dict().keys() == {
        name for name in found.student.state_dict() if not name.startswith("postfilter.")
    }
    assert made.teacher is found.teacher


def test_new_weights_have_filters_of_both_sizes() -> None:
    for voxel in ((8.0, 8.0, 8.0), (50.0, 4.6, 4.6)):
        config = config_for_voxels(voxel)
        assert config.student_filter is not None
        assert config.teacher_filter is not None
        assert config.teacher_filter.layers > config.student_filter.layers


@pytest.mark.parametrize(
    "text",
    [
        "", "16", "16,3", "16,3,160,1", "a,b,c", "0,3,160", "16,-1,160", "16,65,160", "16,3,256",
        "16,4,160,2,2", "16,4,160,0,2,2", "16,3,160,2,4,4",
    ],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="give width, layers, finest"):
        FilterConfig.parse(text)
    result = CliRunner().invoke(app, ["train", "S", "W", "--student-filter", text])
    assert isinstance(result.exception, SettingsError)


def test_cells_that_do_not_fill_those_of_latents_are_refused() -> None:
    sizes = DecoderSizes(student_filter=FilterConfig(8, 2, 160, cell=(2, 3, 4)))
    with pytest.raises(SettingsError, match=r"cells of \(2, 3, 4\) voxels do not fill those of \(8, 8, 8\)"):
        sizes.given_to(TINY)


def test_what_is_kept_of_a_quality_is_dropped_when_learning_goes_on() -> None:
    torch.manual_seed(3)
    convolution, affine = Convolution(2, 3, 1), QualityAffine(3)
    x, quality = torch.randn(1, 2, 4, 4, 4), torch.tensor([100.0])
    for change in (0.0, 0.5):
        affine.train()
        with torch.no_grad():
            affine.scale.add_(change)
            wanted = affine(convolution(x), quality)
        affine.eval()
        with torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(affine.behind(convolution, x, quality), wanted)


def test_kernels_are_kept_of_few_qualities() -> None:
    convolution, affine = Convolution(2, 3, 1), QualityAffine(3).eval()
    x = torch.randn(1, 2, 4, 4, 4)
    with torch.inference_mode():
        for quality in range(2 * KEPT):
            affine.behind(convolution, x, torch.tensor([float(quality)]))
            assert 0 < len(affine._kept) <= KEPT

"""Builders of test data: smooth volumes, and tiny weights that make a working codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from object_store import ObjectStore

from ucray.codec.chunk import ChunkFormat
from ucray.codec.conditioning import QualityAffine
from ucray.codec.linear import start_linear
from ucray.codec.network import Analysis, Synthesis, synthesis_of
from ucray.codec.weights import Weights
from ucray.config import AnalysisConfig, CodecConfig, FilterConfig, SynthesisConfig
from ucray.grid import Shape3, triple
from ucray.training.calibrate import freeze, to_weights
from ucray.training.loss import Coder

Voxels = npt.NDArray[np.generic]
SmoothVolume = Callable[[Shape3, int], npt.NDArray[np.float32]]
VoxelsOf = Callable[[ChunkFormat, Shape3, int], Voxels]

# A deadline would measure the other processes of the machine, not the code.
settings.register_profile("ucray", deadline=None, max_examples=50)
settings.load_profile("ucray")

NORMALISATIONS = {
    "uint8": (128.0, 30.0),
    "uint16": (30000.0, 5000.0),
    "int16": (-100.0, 800.0),
    "float32": (0.5, 0.1),
}
"""Offset and scale of the test volumes of each dtype."""

TINY = CodecConfig(
    code_stride=(2, 2, 2),
    groups=(3, 5),
    checkered=1,
    context_width=6,
    code_width=4,
    codes=16,
    analysis=AnalysisConfig(grid_width=8, grid_blocks=1, latent_width=8, latent_blocks=1),
    teacher=SynthesisConfig(latent_width=12, latent_blocks=1, grid_width=12, grid_blocks=1, inr_width=6),
    student=SynthesisConfig(latent_width=8, latent_blocks=1, grid_width=8, grid_blocks=1, inr_width=4),
)
"""Isotropic: 16 x 16 x 16 voxels a code."""

TINY_FILTERED = msgspec.structs.replace(
    TINY,
    teacher_filter=FilterConfig(width=12, layers=4, finest=255),
    student_filter=FilterConfig(width=8, layers=3, finest=255),
)
"""With post-filters: weights of version 2."""

TINY_DEPENDENT = msgspec.structs.replace(TINY, first_dependent=18)
"""With a trellis: weights of version 3."""

TINY_INTERLACED = msgspec.structs.replace(TINY_DEPENDENT, interlaced=True)
"""With its first group interlaced too: weights of version 4."""

TINY_LONG_PATHS = msgspec.structs.replace(TINY_INTERLACED, trellis_states=256)
"""With the larger trellis too: weights of version 5."""

TINY_CELLS = msgspec.structs.replace(
    TINY_LONG_PATHS, student_filter=FilterConfig(width=12, layers=4, finest=255, cell=(2, 4, 4))
)
"""With a post-filter on cells of its own too: weights of version 6."""

TINY_ANISOTROPIC = msgspec.structs.replace(TINY, levels=(0, 2, 2), latent_stride=(1, 2, 2))
"""For thick slices: 2 x 16 x 16 voxels a code."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch to one thread: these networks are too small to gain from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smooth_volume() -> SmoothVolume:
    """Random volumes (shape, seed) without sharp edges: float32, mean 0, standard deviation 1."""
    return smooth_volume_of


@pytest.fixture(scope="session")
def tiny_weights() -> Weights:
    """Untrained weights of `TINY` whose every part does something; the same on every call."""
    return build_weights(TINY, seed=1)


@pytest.fixture(scope="session")
def filtered_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_FILTERED`."""
    return build_weights(TINY_FILTERED, seed=3)


@pytest.fixture(scope="session")
def dependent_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_DEPENDENT`."""
    return build_weights(TINY_DEPENDENT, seed=1)


@pytest.fixture(scope="session")
def interlaced_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_INTERLACED`."""
    return build_weights(TINY_INTERLACED, seed=1)


@pytest.fixture(scope="session")
def long_path_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_LONG_PATHS`."""
    return build_weights(TINY_LONG_PATHS, seed=1)


@pytest.fixture(scope="session")
def cell_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_CELLS`."""
    return build_weights(TINY_CELLS, seed=3)


@pytest.fixture(scope="session")
def anisotropic_weights() -> Weights:
    """Like `tiny_weights`, for `TINY_ANISOTROPIC`."""
    return build_weights(TINY_ANISOTROPIC, seed=2)


@pytest.fixture(scope="session")
def chunk_format() -> Callable[[str], ChunkFormat]:
    """Formats of 32 x 32 x 32 chunks by dtype, with 0 as the fill value."""

    def build(dtype: str) -> ChunkFormat:
        offset, scale = NORMALISATIONS[dtype]
        return ChunkFormat((32, 32, 32), dtype, 0.0, offset, scale)

    return build


@pytest.fixture(scope="session")
def voxels_of() -> VoxelsOf:
    """Smooth voxels (format, shape, seed) in a chunk format's dtype, none of them its fill value."""

    def build(chunk: ChunkFormat, shape: Shape3, seed: int) -> Voxels:
        values = smooth_volume_of(shape, seed) * chunk.scale + chunk.offset
        if chunk.dtype != "float32":
            limits = np.iinfo(chunk.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        voxels: npt.NDArray[Any] = values.astype(chunk.dtype)
        return np.where(voxels == chunk.fill_value, voxels + voxels.dtype.type(1), voxels)

    return build


def smooth_volume_of(shape: Shape3, seed: int) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(shape)
    frequencies = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    smoothing = np.exp(-200.0 * sum(f * f for f in frequencies))
    smooth = np.fft.ifftn(np.fft.fftn(noise) * smoothing).real + 0.004 * noise
    smooth -= smooth.mean()
    return np.asarray(smooth / smooth.std(), dtype=np.float32)


def build_weights(config: CodecConfig, seed: int) -> Weights:
    chunk = triple(2 * n for n in config.stride)
    tiles = torch.from_numpy(np.stack([smooth_volume_of(chunk, seed + n) for n in range(6)])[:, None])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        coder = Coder(config)
        teacher, student = synthesis_of(config, "teacher"), synthesis_of(config, "student")
        assert isinstance(coder.analysis, Analysis)
        for synthesis in (teacher, student):
            assert isinstance(synthesis, Synthesis)
            start_linear(coder.analysis, synthesis, tiles)
            # Corrections start at zero; a test could not see whether they are computed at all.
            for layer in (synthesis.correct, synthesis.inr.value):
                layer.weight.normal_(std=0.05)
            if synthesis.postfilter is not None:
                synthesis.postfilter.leave.weight.normal_(std=0.1)
        coder.analysis.correct.weight.normal_(std=0.01)
        for part in (coder.analysis, teacher, student):
            for module in part.modules():
                if isinstance(module, QualityAffine):
                    module.scale.normal_(std=0.05)
                    module.shift.normal_(std=0.05)
        quality = torch.full((len(tiles),), 128.0)
        coder.start(tiles, quality, generator)
        for network in coder.prior.networks:
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
        coder(tiles, quality, generator)
        freeze(coder)
        return to_weights(config, coder, teacher, student, [tiles], {"seed": seed})


@pytest.fixture(scope="session")
def tiny_config() -> CodecConfig:
    """The configuration of `tiny_weights`."""
    return TINY


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server on loopback, its credentials in the environment."""
    with ObjectStore(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            if name != "AWS_ENDPOINT_URL":
                patch.setenv(name, value)
        server.create_bucket("ucray-tests")
        yield server


@pytest.fixture
def bucket(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a bucket of that server, which the environment names as the endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    return "s3://ucray-tests"


@pytest.fixture
def no_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An environment without S3 credentials; gives an endpoint to use in it.

    s3fs keeps connections by their options, and with them the credentials of their first use. The
    server's endpoint in another spelling is another connection.
    """
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    return store.endpoint + "/"

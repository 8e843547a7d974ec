"""Weights: one file, one digest, and no damaged table ever reaches a decoder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec.structs import replace
from safetensors.numpy import save

from ucray.codec.context import FEATURE_UNITS, TABLES
from ucray.codec.frequencies import TOTAL
from ucray.codec.network import analysis_of, load_network, stored_synthesis, synthesis_of
from ucray.codec.stream import StreamModel
from ucray.codec.wavelet import WaveletPacket
from ucray.codec.weights import FORMAT, SCALE, VERSIONS, Array, Weights, stream_tensors
from ucray.config import CodecConfig
from ucray.errors import SettingsError, WeightsError
from ucray.grid import Shape3, triple
from ucray.training.calibrate import freeze, load_coder
from ucray.training.loss import Coder

Tensors = dict[str, npt.NDArray[Any]]


def with_tensors(weights: Weights, **changes: npt.NDArray[np.generic] | None) -> Weights:
    """Other `stream` tensors; None leaves one out."""
    tensors = dict(weights.tensors)
    for name, array in changes.items():
        if array is None:
            del tensors[f"stream.{name}"]
        else:
            tensors[f"stream.{name}"] = array
    return Weights(weights.config, tensors, weights.training)


def rewritten(weights: Weights, header: object, key: str = f"{FORMAT}-1") -> bytes:
    """The tensors of `weights` in a file with another header."""
    return bytes(save(dict(weights.tensors), metadata={key: json.dumps(header)}))


def test_round_trip(tiny_weights: Weights) -> None:
    training = {"steps": [1200, 500], "source": {"name": "fib25"}, "psnr": 30.5}
    written = Weights(tiny_weights.config, tiny_weights.tensors, training)
    read = Weights.from_bytes(written.to_bytes())
    assert read.config == written.config
    assert read.training == training
    assert read.tensors.keys() == written.tensors.keys()
    for name, array in written.tensors.items():
        assert read.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(read.tensors[name], array)
    assert (read.digest, read.stream_digest) == (written.digest, written.stream_digest)


@pytest.mark.parametrize(
    ("version", "name", "unnamed"),
    [
        (
            1,
            "tiny_weights",
            {"teacher_filter", "student_filter", "first_dependent", "interlaced", "trellis_states"},
        ),
        (2, "filtered_weights", {"first_dependent", "interlaced", "trellis_states"}),
        (3, "dependent_weights", {"interlaced", "trellis_states"}),
        (4, "interlaced_weights", {"trellis_states"}),
        (5, "long_path_weights", set()),
        (6, "cell_weights", set()),
    ],
)
def test_weights_are_of_the_first_version_that_knows_their_parts_and_say_so(
    version: int, name: str, unnamed: set[str], request: pytest.FixtureRequest
) -> None:
    weights: Weights = request.getfixturevalue(name)
    data = weights.to_bytes()
    read = Weights.from_bytes(data)
    assert read.config == weights.config
    assert read.config.version == version
    assert read.digest == weights.digest
    assert f'"{FORMAT}-{version}"'.encode() in data
    # Digests of older versions are taken of what those knew.
    plain = weights.config.to_json()
    assert set(CodecConfig.__struct_fields__) - set(plain) == unnamed
    filters = [sizes for part in ("teacher_filter", "student_filter") if (sizes := plain.get(part))]
    assert all(("cell" in sizes) == (version == 6) for sizes in filters)


def test_weights_travel_to_a_worker_after_they_have_coded(tiny_weights: Weights) -> None:
    grid = (1, 1, 1)
    codes = np.zeros((tiny_weights.config.code_stages, *grid), np.uint8)
    cells = triple(
        c // s for c, s in zip(tiny_weights.config.stride, tiny_weights.config.latent_cell, strict=True)
    )
    latents = np.zeros((*cells, tiny_weights.config.latents), np.float32)
    symbols, _ = tiny_weights.stream.quantise(codes, latents, 200)
    coded = tiny_weights.stream.encode(symbols)
    there = pickle.loads(pickle.dumps(tiny_weights))
    assert there == tiny_weights
    assert np.array_equal(there.stream.encode(symbols)[0], coded[0])


def test_bytes_do_not_depend_on_the_order_of_the_tensors(tiny_weights: Weights) -> None:
    reordered = dict(reversed(list(tiny_weights.tensors.items())))
    other = Weights(tiny_weights.config, reordered, tiny_weights.training)
    assert other.to_bytes() == tiny_weights.to_bytes() == tiny_weights.to_bytes()
    assert other.digest == tiny_weights.digest


def test_digest_ignores_training_and_the_layout_of_arrays(tiny_weights: Weights) -> None:
    untold = Weights(tiny_weights.config, tiny_weights.tensors)
    strided = Weights(
        tiny_weights.config, {k: np.asfortranarray(v) for k, v in tiny_weights.tensors.items()}, {"steps": 9}
    )
    assert untold.digest == strided.digest == tiny_weights.digest
    assert len(tiny_weights.digest) == 64
    assert Weights.from_bytes(strided.to_bytes()).digest == tiny_weights.digest


def test_digest_depends_on_every_tensor_and_on_the_configuration(tiny_weights: Weights) -> None:
    digests = {tiny_weights.digest}
    for name, array in tiny_weights.tensors.items():
        changed = array.copy()
        changed.reshape(-1)[-1] = 0 if changed.reshape(-1)[-1] else 1
        digests.add(Weights(tiny_weights.config, dict(tiny_weights.tensors) | {name: changed}).digest)
    other = replace(tiny_weights.config, wavelet="db2")
    digests.add(Weights(other, tiny_weights.tensors).digest)
    assert len(digests) == len(tiny_weights.tensors) + 2


def test_stream_digest_ignores_the_networks(tiny_weights: Weights) -> None:
    negated = {k: v if k.startswith("stream.") else np.negative(v) for k, v in tiny_weights.tensors.items()}
    other = Weights(tiny_weights.config, negated)
    assert other.stream_digest == tiny_weights.stream_digest
    assert other.digest != tiny_weights.digest
    base = with_tensors(tiny_weights, base=tiny_weights.stream.context.base + np.int16(1))
    assert base.stream_digest != tiny_weights.stream_digest


def test_decoder_holds_stream_and_student_and_nothing_else(tiny_weights: Weights) -> None:
    decoder = tiny_weights.decoder()
    parts = {name.split(".")[0] for name in decoder.tensors}
    assert parts == {"stream", "student"}
    assert decoder.part("student").keys() == tiny_weights.part("student").keys()
    assert decoder.part("stream").keys() == tiny_weights.part("stream").keys()
    assert dict(decoder.training) == {}
    assert decoder.stream_digest == tiny_weights.stream_digest
    assert decoder.digest == decoder.decoder().digest != tiny_weights.digest
    assert Weights.from_bytes(decoder.to_bytes()).digest == decoder.digest


def test_part_takes_off_its_prefix(tiny_weights: Weights) -> None:
    assert set(tiny_weights.part("stream")) >= {"codebook", "step", "gain", "frequencies"}
    assert all(name.startswith("teacher.") for name in tiny_weights.part("teacher", keep_prefix=True))
    assert tiny_weights.part("nothing") == {}


def test_stream_tables_are_the_tensors(tiny_weights: Weights) -> None:
    config, stream = tiny_weights.config, tiny_weights.stream
    assert stream.context.code_stride == config.code_stride
    assert (stream.context.groups, stream.context.checkered) == (config.groups, config.checkered)
    made = stream_tensors(stream)
    stored = tiny_weights.part("stream", keep_prefix=True)
    assert made.keys() == stored.keys()
    for name, array in stored.items():
        assert made[name].dtype == array.dtype
        np.testing.assert_array_equal(made[name], array)


def test_every_cut_is_refused(tiny_weights: Weights) -> None:
    data = tiny_weights.decoder().to_bytes()
    for length in [*range(0, 200), *range(200, len(data), 997), len(data) - 1]:
        with pytest.raises(WeightsError):
            Weights.from_bytes(data[:length])


def test_a_flipped_bit_is_refused_or_seen_in_the_digest(tiny_weights: Weights) -> None:
    decoder = tiny_weights.decoder()
    data = decoder.to_bytes()
    random = np.random.default_rng(0)
    header = int.from_bytes(data[:8], "little") + 8
    unnoticed = []
    for place in [*range(header), *random.integers(header, len(data), 200).tolist()]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        try:
            if Weights.from_bytes(bytes(flipped)).digest == decoder.digest:
                unnoticed.append(place)
        except WeightsError:
            pass
    assert unnoticed == []


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"PK\x03\x04" * 20, b"{}", b"\xff" * 100])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsError):
        Weights.from_bytes(data)


def test_foreign_safetensors_are_refused(tiny_weights: Weights) -> None:
    for data in (
        save({"weight": np.zeros(3, np.float32)}),
        save({"weight": np.zeros(3, np.float32)}, metadata={"format": "pt"}),
        rewritten(tiny_weights, {}, key=f"{FORMAT}-{max(VERSIONS) + 1}"),
    ):
        with pytest.raises(WeightsError, match=FORMAT):
            Weights.from_bytes(bytes(data))


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        None,
        "config",
        {"config": {}},
        {"config": {"latents": -1}, "training": {}},
        {"config": {"pickle": "yes"}, "training": {}},
        {"config": {}, "training": 5},
        {"config": {"levels": [2, 2]}, "training": {}},
    ],
    ids=str,
)
def test_headers_that_do_not_parse_are_refused(tiny_weights: Weights, header: object) -> None:
    with pytest.raises(WeightsError):
        Weights.from_bytes(rewritten(tiny_weights, header))


def test_another_configuration_than_that_of_the_tables_is_refused(tiny_weights: Weights) -> None:
    config = tiny_weights.config.to_json()
    for change in (
        {"groups": [3, 6]},
        {"checkered": 2},
        {"context_width": 7},
        {"codes": 32},
        {"code_stages": 3},
        {"code_width": 5},
    ):
        with pytest.raises(WeightsError):
            Weights.from_bytes(rewritten(tiny_weights, {"config": config | change, "training": {}}))


def _moved(frequencies: npt.NDArray[Any], source: int, target: int, count: int) -> npt.NDArray[Any]:
    """Take `count` from one frequency and give it to another, so that the sum over all stays."""
    moved = frequencies.copy()
    moved.reshape(-1)[source] -= count
    moved.reshape(-1)[target] += count
    return moved


BAD_TABLES: dict[str, Callable[[Tensors], Tensors]] = {
    **{
        f"no {name}": lambda stream, name=name: {k: v for k, v in stream.items() if k != name}  # type: ignore[misc]
        for name in (
            *("codebook", "unit", "step", "gain", "base", "deviation"),
            *("reach", "frequencies", "code_frequencies"),
            *("context.0.first.weight", "context.2.last.bias", "context.1.middle.shift"),
        )
    },
    "steps of int16": lambda s: s | {"step": s["step"].astype(np.int16)},
    "a step of zero": lambda s: s | {"step": s["step"] * 0},
    "a step too wide": lambda s: s | {"step": s["step"] * 0 + (1 << 21)},
    "a unit of zero": lambda s: s | {"unit": s["unit"] * 0},
    "a unit below zero": lambda s: s | {"unit": -s["unit"]},
    "a unit too fine": lambda s: s | {"unit": s["unit"] * np.float32(1e-20)},
    "a unit too coarse": lambda s: s | {"unit": s["unit"] * np.float32(1e20)},
    "a shift out of range": lambda s: s | {"context.0.first.shift": np.array([200], np.uint8)},
    "a context network of another shape": lambda s: (
        s | {"context.1.first.weight": s["context.1.first.weight"][:, 1:]}
    ),
    "frequencies of int16": lambda s: s | {"frequencies": s["frequencies"].astype(np.int16)},
    "gain of fewer qualities": lambda s: s | {"gain": s["gain"][:-1]},
    "a frequency of zero": lambda s: (
        s | {"frequencies": _moved(s["frequencies"], 0, 2, int(s["frequencies"][0]))}
    ),
    "a sum too small": lambda s: s | {"frequencies": _moved(s["frequencies"], 2, 3, 1)[:-1]},
    # A table's sum is wrong, the next one's too, and together they are right.
    "mass in another table": lambda s: s | {"frequencies": _moved(s["frequencies"], 2, 8, 1)},
    "mass in another stage": lambda s: (
        s | {"code_frequencies": _moved(s["code_frequencies"], 0, s["code_frequencies"].shape[1], 1)}
    ),
    "a code frequency of zero": lambda s: (
        s | {"code_frequencies": _moved(s["code_frequencies"], 0, 1, int(s["code_frequencies"][0, 0]))}
    ),
    "no tables": lambda s: s | {"reach": s["reach"][:0], "frequencies": s["frequencies"][:0]},
    "a reach below zero": lambda s: s | {"reach": np.concatenate([[-1], s["reach"]]).astype(np.int16)},
    "a reach of one table": lambda s: s | {"reach": s["reach"][:1]},
    "a longer reach": lambda s: s | {"reach": s["reach"] + np.int16(1)},
    "a reach too short to tell one symbol from two": lambda s: (
        s
        | {
            "reach": np.ones(TABLES, np.int16),
            "frequencies": np.full(4 * TABLES, TOTAL // 4, np.uint16),
        }
    ),
    "a reach that is one number": lambda s: s | {"reach": np.array(4, np.int16)},
    "a reach of two axes": lambda s: s | {"reach": s["reach"][:, None]},
    "frequencies of two axes": lambda s: s | {"frequencies": s["frequencies"].reshape(2, -1)},
}


@pytest.mark.parametrize("spoil", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_tables_are_refused(tiny_weights: Weights, spoil: Callable[[Tensors], Tensors]) -> None:
    decoder = tiny_weights.decoder()
    spoilt = {f"stream.{name}": array for name, array in spoil(decoder.part("stream")).items()}
    student = decoder.part("student", keep_prefix=True)
    header = {"config": decoder.config.to_json(), "training": {}}
    data = rewritten(Weights(decoder.config, spoilt | student), header)
    with pytest.raises(WeightsError):
        Weights.from_bytes(data)


@pytest.mark.parametrize("table", ["unit", "deviation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_of_no_number_are_refused(tiny_weights: Weights, table: str, value: float) -> None:
    array = tiny_weights.tensors[f"stream.{table}"].copy()
    array.reshape(-1)[0] = value
    with pytest.raises(WeightsError):
        Weights.from_bytes(with_tensors(tiny_weights, **{table: array}).to_bytes())


REFERENCE_PARTS = ["weight", "shift", "lapped.axes.z.0.first", "lapped.axes.x.3.last"]


@pytest.mark.parametrize("name", REFERENCE_PARTS)
@pytest.mark.parametrize("spoil", [lambda array: array[:0], lambda array: array.astype(np.int32)])
def test_a_misshapen_reference_is_refused(
    tiny_weights: Weights, name: str, spoil: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    tensors = dict(tiny_weights.tensors)
    tensors[f"reference.{name}"] = spoil(tensors[f"reference.{name}"])
    with pytest.raises(WeightsError, match="misshapen"):
        _ = Weights(tiny_weights.config, tensors).reference
    del tensors[f"reference.{name}"]
    with pytest.raises(WeightsError, match=r"misshapen|no reference"):
        _ = Weights(tiny_weights.config, tensors).reference


def test_networks_are_loaded_as_stored(tiny_weights: Weights) -> None:
    student = synthesis_of(tiny_weights.config, "student")
    load_network(tiny_weights, "student", student)
    state = student.state_dict()
    stored = tiny_weights.part("student")
    assert state.keys() == {name for name in stored if not name.endswith(SCALE)}
    for name, values in state.items():
        expected: npt.NDArray[np.float32] = stored[name].astype(np.float32)
        if stored[name].dtype == np.int8:
            scale = stored[name + SCALE].astype(np.float32)
            expected *= scale.reshape(-1, *[1] * (expected.ndim - 1))
        np.testing.assert_array_equal(values.numpy(), expected)


def test_eight_bits_keep_a_student_s_matrices(tiny_weights: Weights) -> None:
    """Rounded to the nearest of 255 values a row, the largest at the end of the range."""
    matrices = {n: a for n, a in tiny_weights.part("student").items() if a.dtype == np.int8}
    assert {"linear.weight", "latent.0.spatial.weight", "inr.hidden.weight"} <= matrices.keys()
    for name, array in matrices.items():
        rows = np.abs(array.reshape(len(array), -1).astype(int)).max(axis=1)
        assert set(rows[rows > 0]) == {127}, name


@pytest.mark.parametrize(
    "sizes",
    [
        {"latent_width": 4096, "latent_blocks": 64},
        {"grid_width": 4096, "grid_blocks": 1},
        {"inr_width": 4096},
    ],
)
def test_a_network_far_larger_than_its_tensors_is_never_built(
    tiny_weights: Weights, sizes: dict[str, int]
) -> None:
    student = tiny_weights.config.student
    assert student is not None
    config = replace(tiny_weights.config, student=replace(student, **sizes))
    with pytest.raises(WeightsError, match=r"does not fit its configuration|features a voxel"):
        stored_synthesis(Weights(config, tiny_weights.tensors), "student")


def test_a_linear_decoder_far_larger_than_its_tensors_is_never_built(tiny_weights: Weights) -> None:
    """64 GiB by its configuration, without a network to speak of."""
    config = replace(
        tiny_weights.config, levels=(4, 4, 4), latent_stride=(8, 8, 8), code_stride=(1, 1, 1),
        groups=(4096, 4096), student=None, student_filter=None,
    )  # fmt: skip
    with pytest.raises(WeightsError, match="does not fit its configuration"):
        stored_synthesis(Weights(config, tiny_weights.tensors), "student")


@pytest.mark.parametrize("name", ["code_width", "context_width"])
def test_more_features_than_a_chunk_has_room_for_are_refused(tiny_weights: Weights, name: str) -> None:
    voxels = {
        "levels": (0, 0, 0),
        "latent_stride": (1, 1, 1),
        "code_stride": (1, 1, 1),
        "groups": (1,),
        "checkered": 0,
    }
    config = replace(tiny_weights.config, **voxels | {name: 65})
    with pytest.raises(WeightsError, match="more than 64 features a voxel"):
        Weights(config, tiny_weights.tensors).check_stream()


@pytest.mark.parametrize(
    ("wavelet", "levels"),
    [("db4", (4, 4, 4)), ("db2", (4, 4, 4)), ("coif17", (2, 2, 2)), ("db38", (4, 4, 4)), ("dmey", (4, 4, 1))],
)
def test_wavelets_that_would_take_all_memory_are_refused(wavelet: str, levels: Shape3) -> None:
    with pytest.raises(SettingsError, match="wavelet"):
        WaveletPacket(wavelet, levels)


def test_more_latents_than_a_cell_can_hold_are_refused(tiny_weights: Weights) -> None:
    config = replace(tiny_weights.config, groups=(4096,) * 16)
    with pytest.raises(WeightsError, match="65536 latents"):
        Weights(config, tiny_weights.tensors).check_stream()


def test_metadata_that_lead_a_parser_astray_are_refused(tiny_weights: Weights) -> None:
    nested = "[" * 100_000
    for text in (nested, '{"config": ' + nested):
        data = bytes(save(dict(tiny_weights.tensors), metadata={f"{FORMAT}-1": text}))
        with pytest.raises(WeightsError, match="does not parse"):
            Weights.from_bytes(data)
    none = b'{"__metadata__":null}'
    with pytest.raises(WeightsError):
        Weights.from_bytes(len(none).to_bytes(8, "little") + none)


@pytest.mark.parametrize("scale", [None, np.ones(3, np.float32), np.ones((1, 1), np.float32)])
def test_a_scale_that_does_not_fit_is_refused(tiny_weights: Weights, scale: Array | None) -> None:
    name = "student.linear.weight" + SCALE
    tensors = {n: a for n, a in tiny_weights.tensors.items() if n != name}
    if scale is not None:
        tensors[name] = scale
    damaged = Weights(tiny_weights.config, tensors)
    with pytest.raises(WeightsError, match="scale"):
        load_network(damaged, "student", synthesis_of(damaged.config, "student"))


def test_decoder_weights_cannot_load_an_analysis(tiny_weights: Weights) -> None:
    with pytest.raises(WeightsError, match="hold no analysis"):
        load_network(tiny_weights.decoder(), "analysis", analysis_of(tiny_weights.config))


def test_a_network_of_another_shape_is_refused(tiny_weights: Weights) -> None:
    with pytest.raises(WeightsError, match="student"):
        load_network(tiny_weights, "student", synthesis_of(tiny_weights.config, "teacher"))


def test_frozen_networks_are_those_of_the_file(tiny_weights: Weights) -> None:
    """Stage 2 distils against the frozen stream; it must be the one that decoders will see."""
    config: CodecConfig = tiny_weights.config
    coder = Coder(config)
    load_coder(tiny_weights, coder)
    with torch.no_grad():
        for tensor in (*coder.analysis.parameters(), *coder.analysis.buffers(), coder.codebook.entries):
            tensor.add_(1e-5 * torch.ones_like(tensor))
    freeze(coder)
    assert not any(parameter.requires_grad for parameter in coder.parameters())
    for name, value in coder.analysis.state_dict().items():
        assert torch.equal(value, value.half().float()), name
    assert torch.equal(
        coder.codebook.entries * FEATURE_UNITS, (coder.codebook.entries * FEATURE_UNITS).round()
    )


def test_training_goes_on_from_the_stored_tables(tiny_weights: Weights) -> None:
    """Loaded into the trainable prior and rounded again, every table is what it was."""
    config = tiny_weights.config
    coder = Coder(config)
    load_coder(tiny_weights, coder)
    context = coder.prior.to_integers(coder.codebook.entries)
    again = stream_tensors(StreamModel(context, tiny_weights.stream.frequencies))
    for name, array in tiny_weights.part("stream", keep_prefix=True).items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"analysis": None}, {"code_stages": 0}, {"code_width": 0}, {"code_stages": 0, "code_width": 0}],
)
def test_codes_and_the_networks_that_compute_them_go_together(changes: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError, match="codes have stages"):
        CodecConfig.parse(CodecConfig().to_json() | changes)
    whole = CodecConfig().to_json() | {"analysis": None, "code_stages": 0, "code_width": 0}
    assert CodecConfig.parse(whole).to_json() == whole

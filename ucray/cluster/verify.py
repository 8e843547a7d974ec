"""Prove that an archive is whole: grid = objects = index = checksums; and measure it again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import google_crc32c
import numpy as np

from ucray.cluster.plan import worker_memory
from ucray.cluster.pool import over_shards
from ucray.cluster.telemetry import Event, Listener
from ucray.codec.bitstream import read_chunk
from ucray.codec.decoder import ChunkDecoder
from ucray.errors import ArchiveError, SourceError, UcrayError
from ucray.grid import Box, Shape3, parse_box
from ucray.quality import ErrorSum, SeamSum
from ucray.storage.archive import ARRAY_KEY, Archive, open_archive, stray_objects
from ucray.storage.index import shard_key
from ucray.storage.shard import ShardStatistics, split
from ucray.storage.volume import Volume

LOGGER = logging.getLogger(__name__)

CONFIDENCE = 0.95
"""Of what a clean sample says of all shards."""


@dataclass(frozen=True)
class ShardFindings:
    """What verification found in one shard; `problems` are in words, one line each."""

    index: Shape3
    chunks: int
    problems: tuple[str, ...]
    statistics: ShardStatistics | None
    measured: ErrorSum | None
    seams: SeamSum | None


@dataclass(frozen=True)
class Verification:
    """The findings over an archive; it is clean if there are no problems.

    `shards` are those that stand there, `checked` those that were looked into, with `chunks`. Where these
    are a random sample and clean, fewer than the share `damaged_below` of all shards are damaged, with
    a confidence of CONFIDENCE. `stored_psnr` follows from the statistics of encoding, `measured_psnr` from
    decoding the stored bytes and comparing them with the source (None without a source). `seam_error` and
    `seam_step` say whether the faces of chunks show in the error (see SeamSum), by those within shards.
    """

    archive: str
    shards: int
    checked: int
    damaged_below: float | None
    chunks: int
    bytes_checked: int
    stored_psnr: float | None
    measured_psnr: float | None
    measured_max_error: float | None
    seam_error: float | None
    seam_step: float | None
    problems: tuple[str, ...] = field(default=())

    @property
    def clean(self) -> bool:
        return not self.problems


def verify_archive(
    url: str,
    *,
    source: Volume | None = None,
    sample: int | None = None,
    endpoint_url: str | None = None,
    serial: bool = False,
    workers: int | None = None,
    worker_cpus: float | None = None,
    listener: Listener,
) -> Verification:
    """Check every object of an archive, and with a source every voxel.

    With `sample`, one listing says what is missing or extra, and that many shards, drawn at random, are
    looked into.

    Raises
    ------
    ArchiveError
        If there is no archive, or its metadata do not parse.
    SourceError
        If the source is another volume than the archive's, by shape or dtype.
    """
    archive = open_archive(url, endpoint_url)
    settings = archive.settings
    whole = archive.metadata_are_whole()
    region = _region(archive, source) if source is not None else None
    sizes = archive.sizes()
    problems = [f"{key} belongs to no part of the archive" for key in stray_objects(sizes, settings)]
    if not whole:
        problems.append(f"{ARRAY_KEY} does not say what the archive's settings say")
    indices = list(settings.grid.shard_indices())
    present = [index for index in indices if shard_key(index) in sizes]
    problems += [f"shard {shard_key(i)} is missing" for i in indices if shard_key(i) not in sizes]
    looked_into = present if sample is None else _drawn(present, sample)
    clean = True
    chunks = checked = 0
    stored, measured, seams = ErrorSum(), ErrorSum(), SeamSum()
    build = partial(_Checker, url, endpoint_url, source, region)
    total = sum(sizes[shard_key(index)] for index in looked_into)
    memory = worker_memory(settings.shard, np.dtype(settings.dtype).itemsize)
    for findings in over_shards(
        build, looked_into, serial=serial, memory=memory, workers=workers, worker_cpus=worker_cpus
    ):
        problems += [f"shard {shard_key(findings.index)}: {problem}" for problem in findings.problems]
        clean = clean and not findings.problems
        chunks += findings.chunks
        checked += sizes[shard_key(findings.index)]
        if findings.statistics is not None:
            stored += findings.statistics.error
        if findings.measured is not None:
            measured += findings.measured
        if findings.seams is not None:
            seams += findings.seams
        LOGGER.debug(
            "shard %s looked into",
            shard_key(findings.index),
            extra={"shard": list(findings.index), "problems": list(findings.problems)},
        )
        listener(Event("verify", checked, total, f"{len(problems)} problems"))
    return Verification(
        archive=archive.objects.url,
        shards=len(present),
        checked=len(looked_into),
        damaged_below=_damaged_below(len(looked_into)) if clean and len(looked_into) < len(present) else None,
        chunks=chunks,
        bytes_checked=checked,
        stored_psnr=stored.psnr(settings.data_range) if stored.voxels else None,
        measured_psnr=measured.psnr(settings.data_range) if measured.voxels else None,
        measured_max_error=measured.maximum if measured.voxels else None,
        seam_error=seams.error if measured.voxels else None,
        seam_step=seams.step if measured.voxels else None,
        problems=tuple(sorted(problems)),
    )


def _drawn(indices: Sequence[Shape3], count: int) -> list[Shape3]:
    """At most `count` of the shards, others every time: repeated checks see more and more of an archive."""
    places = np.random.default_rng().permutation(len(indices))[:count]
    return [indices[place] for place in sorted(places)]


def _damaged_below(clean: int) -> float:
    """Largest share of damaged shards that lets `clean` draws find none more often than 1 - CONFIDENCE."""
    return float(1.0 - (1.0 - CONFIDENCE) ** (1.0 / clean))


def _region(archive: Archive, source: Volume) -> Box:
    settings = archive.settings
    if source.dtype != settings.dtype:
        raise SourceError(f"{source.url} holds {source.dtype}, the archive {settings.dtype}")
    try:
        region = parse_box(settings.region, source.shape)
    except UcrayError:
        raise SourceError(
            f"{source.url} of shape {source.shape} does not hold region {settings.region}"
        ) from None
    return region


class _Checker:
    """Checks shards of one archive."""

    def __init__(
        self,
        url: str,
        endpoint_url: str | None,
        source: Volume | None,
        region: Box | None,
    ) -> None:
        self._archive = open_archive(url, endpoint_url)
        self._grid = self._archive.settings.grid
        codec = self._archive.codec
        self._digest = bytes.fromhex(codec.weights.stream_digest)
        self._source = source
        self._region = region
        self._decoder = None
        if source is not None:
            self._decoder = ChunkDecoder(codec.weights, self._archive.settings.chunk_format)

    def shard(self, index: Shape3) -> ShardFindings:
        """Check one shard; what is wrong is found, not raised."""
        problems: list[str] = []
        statistics, measured, seams = None, None, None
        chunks: dict[int, bytes] = {}
        try:
            data = self._archive.shard(index)
            chunks = split(data, self._grid)
            statistics = self._archive.statistics(index, google_crc32c.value(data))
            problems += self._check_chunks(index, chunks, statistics)
            if self._source is not None and not problems:
                measured, seams = self._measure(index, chunks)
                problems += _differences(statistics.error, measured)
                bound = self._archive.settings.max_error
                if bound is not None and measured.maximum > bound:
                    problems.append(f"a voxel is off by {measured.maximum:g}, beyond the bound of {bound:g}")
        except UcrayError as error:
            # A store that does not serve one shard is no reason to look at no other.
            problems.append(str(error))
        return ShardFindings(index, len(chunks), tuple(problems), statistics, measured, seams)

    def _check_chunks(
        self, index: Shape3, chunks: dict[int, bytes], statistics: ShardStatistics
    ) -> list[str]:
        problems = []
        figures = {chunk.slot: chunk for chunk in statistics.chunks}
        places = {slot: origin for slot, origin, _ in self._grid.chunk_boxes(index)}
        for slot in sorted(set(chunks) - set(places)):
            problems.append(f"slot {slot} lies outside the volume and holds {len(chunks[slot])} bytes")
        for slot, origin in places.items():
            data = chunks.get(slot, b"")
            if slot not in figures or figures[slot].bytes != len(data):
                problems.append(f"chunk {origin} has {len(data)} bytes, not as its statistics say")
            if not data:
                continue
            try:
                chunk = read_chunk(data, self._digest)
            except ArchiveError as error:
                problems.append(f"chunk {origin}: {error}")
                continue
            if chunk.origin != origin:
                problems.append(f"chunk {origin} holds the chunk of {chunk.origin}")
        return problems

    def _measure(self, index: Shape3, chunks: dict[int, bytes]) -> tuple[ErrorSum, SeamSum]:
        assert self._source is not None
        assert self._region is not None
        assert self._decoder is not None
        settings = self._archive.settings
        shard_box = self._grid.shard_box(index)
        original = self._source.read(shard_box.shifted(self._region.start))
        decoded = np.full(shard_box.shape, settings.stored_fill, settings.dtype)
        places = list(self._grid.chunk_boxes(index))
        present = [(slot, origin) for slot, origin, _ in places if slot in chunks]
        found = self._decoder.decode_many(
            [chunks[slot] for slot, _ in present], [origin for _, origin in present]
        )
        decoded_at = {slot: voxels for (slot, _), voxels in zip(present, found, strict=True)}
        corner = shard_box.start
        total = ErrorSum()
        for slot, _, box in places:
            place = box.shifted((-corner[0], -corner[1], -corner[2])).slices
            if slot in chunks:
                decoded[place] = decoded_at[slot][Box((0, 0, 0), box.shape).slices]
            total += ErrorSum.between(original[place], decoded[place])
        return total, SeamSum.between(original, decoded, settings.grid.chunk)


def _differences(stored: ErrorSum, measured: ErrorSum) -> list[str]:
    # Decoding on another machine may round a voxel differently here and there; a changed source or
    # a wrong decoder moves the mean squared error by far more than one in a hundred.
    if abs(stored.mse - measured.mse) > 0.01 * stored.mse + 1e-6:
        return [
            f"its mean squared error against the source is {measured.mse:.4g}, not {stored.mse:.4g} as stored"
        ]
    return []

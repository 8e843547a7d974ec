"""Jobs, kills, damage and repair in any order, against a plain model of what must hold."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY, build_weights
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ucray
from ucray.cluster.boxes import write_boxes
from ucray.cluster.worker import ShardWriter
from ucray.grid import Shape3
from ucray.storage.index import shard_key

SHAPE = (64, 32, 60)
OPTIONS = ucray.CompressOptions(ratio=4, chunk=(16, 16, 16), shard=(32, 16, 32))
INDICES: list[Shape3] = [(z, y, x) for z in range(2) for y in range(2) for x in range(2)]
SERIAL = ucray.RunOptions(serial=True)

shards = st.sampled_from(INDICES)


class Killed(BaseException):
    """Ends a job as a signal would: nothing in the package catches it."""


@contextmanager
def killed_after(commits: int) -> Iterator[None]:
    """The writer that would commit one shard more dies."""
    really = ShardWriter.write
    left = commits

    def write(self: ShardWriter, index: Shape3, drafts: object) -> object:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return really(self, index, drafts)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        yield


class Jobs(RuleBasedStateMachine):
    """An archive on disk beside what is known of it."""

    folder: Path
    source: str
    weights: str
    whole: dict[str, bytes]

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """What all runs share: a source, weights, and the bytes of a quiet job."""
        cls.folder, cls.source, cls.weights = folder, str(folder / "em.zarr"), str(folder / "tiny")
        ucray.synth(cls.source, SHAPE, seed=4)
        Path(cls.weights).write_bytes(build_weights(TINY, seed=1).to_bytes())
        quiet = folder / "quiet.ucray"
        ucray.compress(cls.source, str(quiet), OPTIONS, weights=cls.weights, run_options=SERIAL)
        cls.whole = contents(quiet)

    @initialize()
    def nothing_yet(self) -> None:
        self.archive = Path(tempfile.mkdtemp(dir=self.folder)) / "em.ucray"
        self.begun = False
        self.present: set[Shape3] = set()
        self.damaged: set[Shape3] = set()
        self.strays: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.archive.parent)

    def _compress(self, boxes: str | None = None) -> ucray.JobReport:
        run = SERIAL.model_copy(update={"boxes": boxes})
        self.begun = True
        return ucray.compress(self.source, str(self.archive), OPTIONS, weights=self.weights, run_options=run)

    @rule()
    def run(self) -> None:
        report = self._compress()
        assert (report.shards, report.resumed, report.left) == (len(INDICES), len(self.present), 0)
        self.present = set(INDICES)

    @rule(chosen=st.sets(shards, min_size=1, max_size=3))
    def run_boxes(self, chosen: set[Shape3]) -> None:
        listing = self.archive.parent / "boxes.json"
        plan = ucray.plan(self.source, OPTIONS, self.weights)
        write_boxes(plan, dict.fromkeys(sorted(chosen), "lost"), str(listing))
        report = self._compress(str(listing))
        self.present |= chosen
        assert report.left == len(INDICES) - len(self.present)

    @rule(commits=st.integers(0, 3))
    def run_and_kill(self, commits: int) -> None:
        missing = [index for index in INDICES if index not in self.present]
        with killed_after(commits):
            if len(missing) > commits:
                with pytest.raises(Killed):
                    self._compress()
            else:
                self._compress()
        self.begun = True
        self.present |= set(missing[:commits])

    @precondition(lambda self: self.present)
    @rule(index=shards)
    def lose(self, index: Shape3) -> None:
        if index in self.present:
            self._file(index).unlink()
            self.present.discard(index)
            self.damaged.discard(index)

    @precondition(lambda self: self.present - self.damaged)
    @rule(index=shards, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def flip_a_bit(self, index: Shape3, place: float, bit: int) -> None:
        if index in self.present - self.damaged:
            data = bytearray(self._file(index).read_bytes())
            data[int(place * len(data))] ^= 1 << bit
            self._file(index).write_bytes(data)
            self.damaged.add(index)

    @precondition(lambda self: self.present - self.damaged)
    @rule(index=shards, kept=st.floats(0, 1, exclude_max=True))
    def cut_off(self, index: Shape3, kept: float) -> None:
        if index in self.present - self.damaged:
            data = self._file(index).read_bytes()
            self._file(index).write_bytes(data[: int(kept * len(data))])
            self.damaged.add(index)

    @rule(first=shards, second=shards)
    def swap(self, first: Shape3, second: Shape3) -> None:
        sound = self.present - self.damaged
        if first != second and {first, second} <= sound:
            one, other = self._file(first).read_bytes(), self._file(second).read_bytes()
            self._file(first).write_bytes(other)
            self._file(second).write_bytes(one)
            self.damaged |= {first, second}

    @precondition(lambda self: self.begun)
    @rule(name=st.sampled_from(["0/c/9/0/0", "0/c/0/0/0.tmp", "thumbs.db"]))
    def drop_something(self, name: str) -> None:
        path = self.archive / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
        self.strays.add(name)

    @precondition(lambda self: self.strays)
    @rule()
    def clean_up(self) -> None:
        for name in self.strays:
            (self.archive / name).unlink()
        self.strays.clear()

    @precondition(lambda self: self.damaged)
    @rule()
    def repair(self) -> None:
        for index in self.damaged:
            self._file(index).unlink()
        self.present -= self.damaged
        self.damaged.clear()
        self.run()

    @invariant()
    def verify_names_all_that_is_wrong_and_nothing_else(self) -> None:
        if not getattr(self, "begun", False):
            return
        found = ucray.verify(str(self.archive), self.source, serial=True)
        missing = set(INDICES) - self.present
        assert {p for p in found.problems if p.endswith("is missing")} == {
            f"shard {shard_key(index)} is missing" for index in missing
        }
        assert {p.partition(" ")[0] for p in found.problems if "belongs to no part" in p} == self.strays
        named = {m[1] for p in found.problems if (m := re.match(r"shard (\S+): ", p))}
        assert named == {shard_key(index) for index in self.damaged}
        assert found.clean == (not missing and not self.damaged and not self.strays)

    @invariant()
    def what_is_sound_has_the_bytes_of_a_quiet_job(self) -> None:
        if not getattr(self, "begun", False):
            return
        for index in self.present - self.damaged:
            key = shard_key(index)
            assert self._file(index).read_bytes() == self.whole[key]
        if self.present == set(INDICES) and not self.damaged and not self.strays:
            assert contents(self.archive) == self.whole

    def _file(self, index: Shape3) -> Path:
        return self.archive / shard_key(index)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_any_order_of_jobs_kills_damage_and_repair(tmp_path: Path) -> None:
    Jobs.prepare(tmp_path)
    case = Jobs.TestCase
    # The same eight orders every time: others are for a longer run with more examples.
    case.settings = settings(
        max_examples=8,
        stateful_step_count=12,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()

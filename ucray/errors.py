"""Every error a user can meet, in one tree.

::

    UcrayError                  exit status 2 unless a subclass says otherwise
    ├── SettingsError           an option, or options that do not go together
    ├── SourceError             the volume to read: missing, no array, wrong axes
    │   └── DtypeError          a voxel type that is not served
    ├── DestinationError        the place to write to: exists with other settings, not writable
    ├── StorageError            the object store: no bucket, no access, no answer
    │   └── CredentialsError    no credentials, or refused ones
    ├── WeightsError            weights: missing, damaged, of another digest
    ├── ArchiveError            an archive: no archive, damaged metadata
    │   └── ChunkError          one coded chunk: cut, flipped, of another model
    └── JobError                a job that failed while it ran; exit status 1
"""

from __future__ import annotations


class UcrayError(Exception):
    """Base of all errors that ucray raises on purpose; its text is one line that says what to do."""

    exit_status = 2


class SettingsError(UcrayError):
    """An option has a value that cannot be served, or two options contradict each other."""


class SourceError(UcrayError):
    """The source volume is missing, is no array, or has axes that are not (z, y, x)."""


class DtypeError(SourceError):
    """The source's voxel type is not one of uint8, uint16, int16, float32."""


class DestinationError(UcrayError):
    """The destination holds something else, or cannot be written to."""


class StorageError(UcrayError):
    """The object store or file system does not serve the request."""


class CredentialsError(StorageError):
    """The object store wants credentials that are missing or wrong."""


class WeightsError(UcrayError):
    """Weights are missing, damaged, or have another digest than the one asked for."""


class ArchiveError(UcrayError):
    """What stands at the archive's place is no ucray archive, or its metadata is damaged."""


class ChunkError(ArchiveError):
    """A coded chunk is cut, has flipped bits, or was coded by another model."""


class JobError(UcrayError):
    """A job failed while it ran; what it had committed stays, and the same command resumes it."""

    exit_status = 1


class BenchError(UcrayError):
    """A peer of the benchmark failed on the volume."""

    exit_status = 1

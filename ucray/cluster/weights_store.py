"""Weights where they lie: shipped, at a path or URL, or kept in the archive that they were trained for."""

from __future__ import annotations

from ucray.cluster.compress import check_empty
from ucray.cluster.pipeline import RunOptions
from ucray.cluster.plan import CompressPlan
from ucray.cluster.session import ray_session
from ucray.cluster.telemetry import Listener
from ucray.cluster.train import train as train_on_ray
from ucray.codec.shipped import shipped_names, shipped_weights
from ucray.codec.weights import Weights
from ucray.errors import DestinationError, WeightsError
from ucray.settings import TrainingConfig
from ucray.storage.archive import GROUP_KEY, WEIGHTS_KEY, Archive, find_archive
from ucray.storage.objects import Objects, object_at


def load_weights(place: str, endpoint_url: str | None = None) -> Weights:
    """Shipped weights by their name, or weights from a path or an s3:// URL.

    Raises
    ------
    WeightsError
        If there are none, or they are damaged.
    """
    if place in shipped_names():
        return shipped_weights(place)
    folder, name = object_at(place, endpoint_url)
    data = folder.get(name)
    if data is None:
        raise WeightsError(f"there are no weights at {place}; `ucray train` makes them")
    return Weights.from_bytes(data)


def trained_for(
    decided: CompressPlan,
    objects: Objects,
    training: TrainingConfig,
    start: Weights | None,
    run_options: RunOptions,
    listener: Listener,
) -> Weights:
    """Weights kept in an archive, trained first if they are not there yet."""
    asked = {"settings": training.model_dump(mode="json"), "start": None if start is None else start.digest}
    asked |= {"volume": decided.volume.identity, "region": str(decided.region)}
    data = objects.get(WEIGHTS_KEY)
    if data is None:
        if objects.get(GROUP_KEY) is None:
            check_empty(objects)
        else:
            _refuse_other_weights(find_archive(objects), objects.url)
        use_gpu = run_options.device == "cuda"
        with ray_session():
            trained = train_on_ray(
                decided.volume,
                training,
                start=start,
                chunk=decided.grid.chunk,
                region=decided.region,
                # Workers that code on processors take a core each; training is one that takes them all.
                workers=(run_options.encode_workers or 1) if use_gpu else 1,
                worker_cpus=run_options.worker_cpus if use_gpu else None,
                use_gpu=use_gpu,
                listener=listener,
            )
        objects.put_new(WEIGHTS_KEY, trained.to_bytes())
        data = objects.get(WEIGHTS_KEY)
        if data is None:
            raise WeightsError(f"{objects.url} does not give back the weights written to it")
    kept = Weights.from_bytes(data)
    # Those of earlier versions do not say which volume they learnt from.
    told = {"volume": asked["volume"]} | dict(kept.training)
    if other := [name for name, value in asked.items() if told.get(name) != value]:
        raise DestinationError(
            f"{objects.url} holds weights trained with another {' and '.join(other)}: {dict(kept.training)}; "
            "give another destination or the same settings"
        )
    return kept


def _refuse_other_weights(archive: Archive | None, url: str) -> None:
    if archive is not None:
        raise DestinationError(
            f"{url} holds an archive made with weights {archive.settings.weights_digest[:12]} "
            "that are not kept in it; give them with --weights"
        )

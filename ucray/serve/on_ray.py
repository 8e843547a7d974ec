"""The gateway on Ray Serve: as many replicas as viewers need, each with a cache of its own.

A configuration of Ray Serve names `ucray.serve.on_ray:build` and gives it Arguments (k8s/base/service.yaml).
"""

from __future__ import annotations

from typing import Any

from ray import serve

from ucray.serve.gateway import Limits
from ucray.serve.start import application
from ucray.storage.volume import open_volume

DEPLOYMENT = "gateway"

REQUESTS = 512
"""That a replica takes at once: more than may wait for a chunk, so that it says itself what is too many."""


class Arguments(Limits):
    """What is served: an archive, and a source beside it; see `ucray serve`."""

    archive: str
    source: str | None = None
    array: str | None = None
    select: str | None = None
    endpoint_url: str | None = None


def build(args: dict[str, Any]) -> serve.Application:
    """The application of Ray Serve, of Arguments; its replicas open archive and source when they start."""
    arguments = Arguments.model_validate(args)

    def gateway() -> Any:
        source = None
        if arguments.source is not None:
            source = open_volume(arguments.source, arguments.array, arguments.endpoint_url, arguments.select)
        return application(arguments.archive, source, arguments, arguments.endpoint_url)

    ingress = serve.ingress(gateway)()
    deployment: serve.Deployment = serve.deployment(name=DEPLOYMENT, max_ongoing_requests=REQUESTS)(ingress)
    return deployment.bind()

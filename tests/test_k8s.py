"""Manifests: built by kustomize, held against KubeRay's and Kubernetes' schemas, and against the code."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from metric_names import RULES, known_metrics, rules
from ray.serve.schema import ServeDeploySchema

from ucray.cli import app
from ucray.cluster.session import WORKER_POOL
from ucray.serve import on_ray

ROOT = Path(__file__).parents[1]
CRDS = Path(os.environ.get("UCRAY_TEST_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
KUSTOMIZATIONS = tuple(f"overlays/{name}" for name in ("cpu", "cpu-small", "gpu", "spot-gpu"))
KUBERAY = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}

Object = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's CRDs are not in {CRDS}")


@cache
def built(kustomization: str) -> tuple[Object, ...]:
    """The objects of one kustomization."""
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / kustomization)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return tuple(yaml.safe_load_all(ended.stdout))


def of_kind(kustomization: str, kind: str) -> list[Object]:
    return [found for found in built(kustomization) if found["kind"] == kind]


def clusters(kustomization: str) -> Iterator[tuple[str, Object]]:
    """Every Ray cluster that is described, with the name of what describes it."""
    for job in of_kind(kustomization, "RayJob"):
        yield job["metadata"]["name"], job["spec"]["rayClusterSpec"]
    for cluster in of_kind(kustomization, "RayCluster"):
        yield cluster["metadata"]["name"], cluster["spec"]
    for service in of_kind(kustomization, "RayService"):
        yield service["metadata"]["name"], service["spec"]["rayClusterConfig"]


def groups(cluster: Object) -> list[Object]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def closed(schema: Object) -> Object:
    """An OpenAPI schema as a JSON Schema that refuses fields it does not name."""
    found: Object = {}
    for name, value in schema.items():
        if name == "properties":
            found[name] = {key: closed(inner) for key, inner in value.items()}
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            found[name] = closed(value)
        elif name in ("allOf", "anyOf", "oneOf"):
            # Structural schemas only add conditions here; what they name stands among the properties.
            found[name] = value
        elif not name.startswith("x-kubernetes"):
            found[name] = value
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@cache
def kuberay_schema(kind: str) -> Object:
    document = yaml.safe_load((CRDS / f"ray.io_{KUBERAY[kind]}.yaml").read_text())
    (version,) = (one for one in document["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_ray_s_objects_fit_kuberay_s_schemas(kustomization: str) -> None:
    checked = 0
    for kind in KUBERAY:
        for found in of_kind(kustomization, kind):
            jsonschema.validate(found, kuberay_schema(kind))
            checked += 1
    assert checked == 3


@needs_kubectl
@needs_crds
def test_an_unknown_field_would_be_refused() -> None:
    (cluster,) = of_kind(KUSTOMIZATIONS[0], "RayCluster")
    spoilt = yaml.safe_load(yaml.safe_dump(cluster))
    spoilt["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePolicy"):
        jsonschema.validate(spoilt, kuberay_schema("RayCluster"))


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_core_objects_fit_kubernetes_schemas(kustomization: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    version = validate.latest_version()
    kinds = set()
    for found in built(kustomization):
        if found["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com"):
            validate.validate(found, version, strict=True)
            kinds.add(found["kind"])
    assert kinds == {"Namespace", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"}


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_jobs_keep_kuberay_s_own_rules(kustomization: str) -> None:
    for job in of_kind(kustomization, "RayJob"):
        spec = job["spec"]
        assert spec["submissionMode"] in MODES
        assert spec["submissionMode"] == "K8sJobMode"
        assert spec["shutdownAfterJobFinishes"]  # without it, a time to live is refused
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] > 0
        assert "clusterSelector" not in spec  # a retry makes a cluster of its own
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_clusters_are_fit_for_the_work(kustomization: str) -> None:
    names = set()
    for name, cluster in clusters(kustomization):
        assert name not in names  # a head's service is named after it, whatever its kind
        names.add(name)
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in groups(cluster):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            pod = group["template"]["spec"]
            assert pod["restartPolicy"] == "Never"  # as the autoscaler, version 2, wants it
            assert pod["securityContext"]["runAsNonRoot"]
            (container,) = pod["containers"]
            given = container["resources"]
            assert given["requests"]["memory"] == given["limits"]["memory"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            (shared,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
            assert shared["medium"] == "Memory"
            # Ray takes 30 % of the memory for its object store, but no more than this without being told.
            wanted = min(
                0.3 * _bytes(given["limits"]["memory"]), max(10e9, 0.95 * _bytes(shared["sizeLimit"]))
            )
            assert wanted <= 0.98 * _bytes(shared["sizeLimit"]), (name, group.get("groupName", "head"))
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            assert {"containerPort": 8080, "name": "metrics"} in container["ports"]
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert names == {"ucray", "ucray-compress", "ucray-train", "ucray-gateway"}


def _bytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) * 2**30


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_clusters_that_compress_keep_their_idle_workers(kustomization: str) -> None:
    kept = {"ucray", "ucray-compress"}
    for name, cluster in clusters(kustomization):
        if name not in kept:
            continue
        kept.remove(name)
        for group in groups(cluster):
            (container,) = group["template"]["spec"]["containers"]
            environment = {given["name"]: given.get("value") for given in container["env"]}
            assert WORKER_POOL.items() <= environment.items(), (name, group.get("groupName", "head"))
    assert not kept


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_each_head_is_kept_from_being_drained(kustomization: str) -> None:
    heads = dict(clusters(kustomization))
    for budget in of_kind(kustomization, "PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"]
        name = budget["metadata"]["name"].removesuffix("-head").replace("ucray-cluster", "ucray")
        labels = heads.pop(name)["headGroupSpec"]["template"]["metadata"]["labels"]
        # KubeRay adds its own label to what the template says.
        assert wanted == {**labels, "ray.io/node-type": "head"}
    assert not heads


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_gpus_are_asked_for_where_the_commands_use_them(kustomization: str) -> None:
    wanted = "gpu" in kustomization
    for name, cluster in clusters(kustomization):
        if (
            name == "ucray-gateway"
        ):  # a picture is decoded in milliseconds; what is scarce stays with the jobs
            continue
        (encode,) = (group for group in cluster["workerGroupSpecs"] if group["groupName"] == "encode")
        limits = encode["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) is wanted, name
    for job in of_kind(kustomization, "RayJob"):
        assert bool({"--gpu", "cuda"} & set(shlex.split(job["spec"]["entrypoint"]))) is wanted


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_a_worker_takes_one_core_where_chunks_are_coded_on_processors(kustomization: str) -> None:
    for name, cluster in clusters(kustomization):
        if name == "ucray-gateway":
            continue
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        (asked,) = (e["value"] for e in head["env"] if e["name"] == "UCRAY_WORKER_CPUS")
        (encode,) = (group for group in cluster["workerGroupSpecs"] if group["groupName"] == "encode")
        limits = encode["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert float(asked) <= float(limits["cpu"])
        assert (float(asked) == 1.0) is (name != "ucray-train" and "nvidia.com/gpu" not in limits), name


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_entrypoints_are_commands_of_this_version(kustomization: str) -> None:
    commands = typer.main.get_command(app)
    for job in of_kind(kustomization, "RayJob"):
        program, command, *arguments = shlex.split(job["spec"]["entrypoint"])
        assert program == "ucray"
        parsed = commands.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
        ports = {p["name"]: p["containerPort"] for p in _head(job)["ports"]}
        assert parsed.params["metrics_port"] == ports["ucray"]
        if command == "train":
            assert parsed.params[
                "storage"
            ]  # a retry finds its checkpoints only where they outlive the cluster


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_the_gateway_s_service_is_one_of_ray_serve(kustomization: str) -> None:
    """Its cluster by the schema of RayCluster, that of RayService not being at hand; the rest by Serve."""
    (service,) = of_kind(kustomization, "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": service["spec"]["rayClusterConfig"]}
    jsonschema.validate(cluster, kuberay_schema("RayCluster"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, name = str(application.import_path).split(":")
    assert getattr(importlib.import_module(module), name) is on_ray.build
    arguments = on_ray.Arguments.model_validate(application.args)
    (deployment,) = application.deployments
    assert deployment.name == on_ray.DEPLOYMENT
    options = deployment.ray_actor_options
    assert options.num_cpus == arguments.threads
    (replicas,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    given = replicas["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(given["cpu"]) >= options.num_cpus
    assert arguments.cache < _bytes(given["memory"]) / 2


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_all_containers_run_one_image(kustomization: str) -> None:
    images = set()
    for found in built(kustomization):
        images |= set(re.findall(r"image: (\S+)", yaml.safe_dump(found)))
    assert images == {"registry.example.org/ucray:0.1.0-" + ("cuda" if "gpu" in kustomization else "cpu")}


def _head(job: Object) -> Object:
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


# Rules


def _groups(path: Path) -> Any:
    document = yaml.safe_load(path.read_text())
    return document.get("spec", document)["groups"]


def test_the_operator_gets_the_rules_of_a_plain_prometheus() -> None:
    assert _groups(ROOT / "k8s" / "base" / "rules.yaml") == _groups(RULES)


def test_rules_ask_for_metrics_that_exist() -> None:
    for rule in rules():
        used = set(re.findall(r"\bucray[a-z0-9_:]+", rule["expr"]))
        assert used
        assert used <= known_metrics(), rule


@needs_promtool
def test_rules_and_alerts_by_promtool() -> None:
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        ended = subprocess.run(
            ["promtool", *command], cwd=ROOT / "deploy", capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

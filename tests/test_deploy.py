"""Images, compose file, Prometheus and Grafana: what can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from metric_names import known_metrics
from prometheus_client import generate_latest
from test_kill import LONG

from ucray.cluster.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "ucray.json"

GRAFANA_VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$job": ".*",
    "$instance": ".*",
    "$price": "1.0",
}
"""What Grafana puts in place of its variables, for example."""


def _dockerfile() -> list[list[str]]:
    """Instructions of the Dockerfile, word by word, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [line.split() for line in lines if line and not line.startswith("#")]


def _pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def _compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_dockerfile_copies_what_exists() -> None:
    copied = [words for words in _dockerfile() if words[0] == "COPY"]
    sources = [word for words in copied for word in words[1:-1] if not word.startswith("--")]
    assert {"ucray", "pyproject.toml", "deploy/constraints.txt"} <= set(sources)
    # What is not named is left out, the virtual environment and its gigabytes above all.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_the_dockerfile_pins_what_was_tested_together() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG RAY={_pinned('ray')}\n" in text
    assert f'"torch=={_pinned("torch")}+cpu"' in text
    installs = 0
    for words in _dockerfile():
        if words[0] == "RUN" and {"pip", "install"} <= set(words):
            assert "--constraint" in words
            installs += 1
        if words[0] == "FROM":
            assert words[1].startswith("rayproject/ray:${RAY}-${PYTHON}-")
    assert installs == 3


def test_every_image_that_runs_ends_as_a_user_with_a_health_check() -> None:
    stages: dict[str, list[list[str]]] = {}
    for words in _dockerfile():
        if words[0] == "FROM":
            stages[words[-1]] = []
        elif stages:
            stages[list(stages)[-1]].append(words)
    assert list(stages) == ["wheel", "cpu", "cuda"]
    for name in ("cpu", "cuda"):
        assert [words[1] for words in stages[name] if words[0] == "USER"][-1] == "1000"
        assert [words for words in stages[name] if words[0] == "HEALTHCHECK"]


@pytest.mark.parametrize(
    "command",
    [
        ("hadolint", "deploy/Dockerfile"),
        ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml"),
    ],
    ids=["hadolint", "compose's schema"],
)
def test_others_find_nothing_wrong(command: tuple[str, ...]) -> None:
    program = Path(sys.executable).with_name(command[0])
    ended = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.skipif(LONG not in os.environ, reason=f"two minutes and 2 GB; {LONG}=1 runs it")
def test_the_images_install_lines_run_in_a_clean_environment(tmp_path: Path) -> None:
    """As the Dockerfile does it, but for torch: its CPU build is not on PyPI."""
    lines = [words for words in _dockerfile() if words[0] == "RUN"]
    (build,) = ([*words[1:]] for words in lines if {"pip", "wheel"} <= set(words))
    install = next(words for words in lines if "/wheels/*.whl" in words)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv" / "bin"
    wheels = tmp_path / "wheels"
    build = [word.replace("/home/ray/wheels", str(wheels)) for word in build]
    subprocess.run([bin_ / "pip", *build[1:]], cwd=ROOT, check=True)
    (wheel,) = wheels.glob("ucray-*.whl")
    install = install[install.index("pip") + 1 :]
    install = [word.replace("/home/ray/constraints.txt", str(DEPLOY / "constraints.txt")) for word in install]
    install = [word.replace("/wheels/*.whl", str(wheel)) for word in install]
    subprocess.run([bin_ / "pip", *install], check=True)
    subprocess.run([bin_ / "ucray", "synth", tmp_path / "em.zarr", "--shape", "32,32,32"], check=True)
    compress = ["compress", "em.zarr", "em.ucray", "--chunk", "32,32,32", "--ratio", "8", "--serial"]
    subprocess.run([bin_ / "ucray", *compress], cwd=tmp_path, check=True)


def test_compose_mounts_what_exists_and_listens_on_loopback() -> None:
    services = _compose()["services"]
    assert set(services) == {"s3", "head", "worker", "prometheus", "grafana"}
    named = set(_compose()["volumes"])
    for name, service in services.items():
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in named or (DEPLOY / source).exists(), source
        for other in service.get("depends_on", {}):
            assert other in services
    build = services["head"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")


def test_nobody_s_secret_stands_in_the_files() -> None:
    for name, service in _compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            assert "SECRET" not in key or value.startswith("${UCRAY_S3_SECRET:?"), name
    for path in [*DEPLOY.rglob("*"), *(ROOT / "k8s").rglob("*")]:
        if path.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}", path.read_text(errors="replace")), path


# Grafana


def _expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_is_the_provisioned_one() -> None:
    document = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    (provider,) = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "dashboards" / "ucray.yml").read_text()
    )["providers"]
    mounts = dict(m.split(":")[:2] for m in _compose()["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    (chosen,) = (v for v in document["templating"]["list"] if v["name"] == "datasource")
    assert chosen["current"]["value"] == source["uid"]
    # Panels side by side do not lie on each other.
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_dashboard_shows_metrics_that_exist() -> None:
    ours = known_metrics()
    # Ray ships dashboards of its own metrics: names that stand there are served.
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    rays = set(re.findall(r"\bray_[a-z_]+", "".join(p.read_text() for p in folder.glob("*.py"))))
    rays |= {f"ray_{name}" for name in re.findall(r"\bnode_[a-z_]+", "".join(_ray_sources(folder)))}
    for expression in _expressions():
        names = set(re.findall(r"\b(?:ucray|ray)_[a-z_]+|\bucray:[a-z0-9_:]+", expression))
        names -= {"ray_io_group"}
        assert names, expression
        assert {name for name in names if name.startswith("ucray")} <= ours, expression
        assert {name for name in names if name.startswith("ray_")} <= rays, expression


def _ray_sources(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("*.py")]


def test_readme_s_table_names_every_metric_and_no_other() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `ucray_")]
    named = {name.split("{")[0] for row in rows for name in re.findall(r"`(ucray_[^`]+)`", row.split("|")[1])}
    families = {
        family.name + "_total" * (family.type == "counter") for family in Telemetry().registry.collect()
    }
    assert named == families


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_metrics_are_named_as_prometheus_wants_it() -> None:
    served = generate_latest(Telemetry().registry)
    ended = subprocess.run(["promtool", "check", "metrics"], input=served, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_and_every_expression_by_promtool(tmp_path: Path) -> None:
    for path in ("prometheus.yml", "rules.yaml"):
        shutil.copy(DEPLOY / path, tmp_path / path)
    rules = []
    for number, expression in enumerate(_expressions()):
        for name, value in GRAFANA_VARIABLES.items():
            expression = expression.replace(name, value)
        rules.append({"record": f"panel:{number}", "expr": expression})
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for command in (["check", "config", "prometheus.yml"], ["check", "rules", "panels.yaml"]):
        ended = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

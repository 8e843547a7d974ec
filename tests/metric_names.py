"""Names of the metrics that a job serves and that the recording rules make, for what asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ucray.cluster.telemetry import Telemetry

RULES = Path(__file__).parents[1] / "deploy" / "rules.yaml"


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def known_metrics() -> set[str]:
    """Everything of ucray's that Prometheus will know."""
    families = list(Telemetry().registry.collect())
    served = {sample.name for family in families for sample in family.samples}
    # What has labels has no sample before it counts.
    served |= {f"{family.name}_total" for family in families if family.type == "counter"}
    served |= {f"{family.name}_bucket" for family in families if family.type == "histogram"}
    return served | {rule["record"] for rule in rules() if "record" in rule}

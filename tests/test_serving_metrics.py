"""Metrics of the service: what is counted, what nodes tell together, what the dashboard shows."""

import importlib.util
import json
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from altiplano.serving import metrics
from altiplano.serving.front.telemetry import METRICS, MemoryMeters, RayMeters, Telemetry
from altiplano.serving.speculation import bridge


def test_an_answer_is_counted_once_with_its_times() -> None:
    meters = MemoryMeters()
    told = Telemetry(meters)
    told.began("a")
    told.began("a")
    told.ended("a", prompt_tokens=5, completion_tokens=3, first_s=0.5, last_s=0.9)
    told.ended("a", prompt_tokens=0, completion_tokens=0, first_s=None, last_s=None)
    told.retried("a", "replica_lost")
    running = meters.values["altiplano_running", frozenset({("model", "a")})]
    assert running == [1, 2, 1, 0]
    assert meters.total("altiplano_prompt_tokens", model="a") == 5
    assert meters.total("altiplano_completion_tokens") == 3
    assert meters.total("altiplano_ttft_s") == 0.5
    assert meters.total("altiplano_time_per_token_s") == pytest.approx(0.2)
    assert meters.total("altiplano_retries", reason="replica_lost") == 1


def test_what_is_recorded_comes_out_of_the_cluster(ray_cluster: dict[str, str]) -> None:
    told = Telemetry(RayMeters())
    told.request("tiny", "/v1/models", 200, 0.02)
    told.rejected("key")
    told.began("tiny")
    told.ended("tiny", prompt_tokens=5, completion_tokens=3, first_s=0.5, last_s=0.9)
    told.retried("tiny", "replica_lost")
    wanted = {f"ray_{name}" for name in METRICS}
    deadline = time.monotonic() + 60
    families: dict[str, Any] = {}
    while not wanted <= families.keys() and time.monotonic() < deadline:
        time.sleep(0.3)
        families = {each.name: each for each in text_string_to_metric_families(metrics.collect())}
    assert wanted <= families.keys()
    assert all(name.startswith(("ray_altiplano_", "ray_vllm_", "ray_serve_")) for name in families)
    for name, metric in METRICS.items():
        assert families[f"ray_{name}"].type == metric.kind


NODE = """\
# HELP ray_node_cpu CPUs
# TYPE ray_node_cpu gauge
ray_node_cpu 2.0
# HELP ray_vllm_spec_decode_num_drafts_total Drafts.
# TYPE ray_vllm_spec_decode_num_drafts_total counter
ray_vllm_spec_decode_num_drafts_total{ReplicaId="REPLICA",model_name="m"} 10.0
# HELP ray_vllm_spec_decode_num_drafts (DEPRECATED, use it with _total metric instead) Drafts.
# TYPE ray_vllm_spec_decode_num_drafts gauge
ray_vllm_spec_decode_num_drafts{ReplicaId="REPLICA",model_name="m"} 10.0
# HELP ray_vllm_spec_decode_num_draft_tokens_total Tokens.
# TYPE ray_vllm_spec_decode_num_draft_tokens_total counter
ray_vllm_spec_decode_num_draft_tokens_total{ReplicaId="REPLICA",model_name="m"} 40.0
ray_vllm_spec_decode_num_draft_tokens_total{ReplicaId="REPLICA",model_name="other"} 7.0
# HELP ray_vllm_spec_decode_num_accepted_tokens_total Tokens.
# TYPE ray_vllm_spec_decode_num_accepted_tokens_total counter
ray_vllm_spec_decode_num_accepted_tokens_total{ReplicaId="REPLICA",model_name="m"} 30.0
"""


def test_counters_are_read_once_though_ray_tells_them_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [NODE.replace("REPLICA", name) for name in ("a", "b")]
    monkeypatch.setattr(metrics, "_texts", lambda: iter(nodes))
    text = metrics.collect()
    assert "ray_node_cpu" not in text
    assert text.count("# TYPE ray_vllm_spec_decode_num_drafts_total") == 1
    counts = metrics.read_counts("m")
    one = {"drafts": 10.0, "draft_tokens": 40.0, "accepted_tokens": 30.0}
    assert counts == {"a": one, "b": one}
    assert metrics.summarise(counts) == {
        "drafts": 20,
        "draft_tokens": 80,
        "accepted_tokens": 60,
        "acceptance": 0.75,
        "tokens_per_step": 4,
    }
    assert metrics.summarise({}) is None


def test_the_dashboard_shows_metrics_that_exist(root: Path) -> None:
    """Ours by our own tables; Ray's and vLLM's by the strings of their installed sources."""
    dashboard = json.loads((root / "k8s" / "grafana-serving.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bray_[a-z0-9_]+", shown)
    }
    drafts = {*bridge._COUNTERS, *bridge._GAUGES, bridge.LATENCY}
    own = {f"ray_{name}" for name in (*METRICS, *drafts)}
    assert {name for name in own if "draft" in name} <= {_plain(own, name) for name in names}
    for name in names:
        if name.startswith("ray_altiplano_"):
            assert _plain(own, name) in own, name
        elif name.startswith("ray_vllm_"):
            assert f'"vllm:{_short(name, "ray_vllm_")}' in _source("vllm", "v1/metrics"), name
        else:
            assert f'"{_short(name, "ray_")}' in _source("ray", "serve/_private"), name


def _plain(own: set[str], name: str) -> str:
    """The name as we gave it: Ray adds `_total` to counters that lack it."""
    return name if name in own else name.removesuffix("_total")


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).removesuffix("_total")


@cache
def _source(package: str, folder: str) -> str:
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    files = (Path(found.origin).parent / folder).glob("*.py")
    return "\n".join(file.read_text() for file in files)

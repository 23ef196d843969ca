"""What the cluster counts about serving, collected from Ray's exporters.

Every node offers its processes' metrics as Prometheus text, some seconds late. Knows their names,
not how the service was started. Costs one HTTP request per node.
"""

from collections.abc import Iterable, Iterator

_FAMILIES = ("ray_altiplano_", "ray_vllm_", "ray_serve_")
"""What `collect` passes on: the rest of Ray's is about nodes, not about the service."""
_COUNTERS = {
    "ray_vllm_spec_decode_num_drafts": "drafts",
    "ray_vllm_spec_decode_num_draft_tokens": "draft_tokens",
    "ray_vllm_spec_decode_num_accepted_tokens": "accepted_tokens",
}
"""Name of Ray's counter (vLLM's, with `ray_` before and `_` for `:`) -> ours. vLLM counts whatever
drafts, our own proposer too (whose `ray_altiplano_draft_*` tell more, but per engine step)."""

Counts = dict[str, dict[str, float]]
"""Replica id -> counter -> value since that replica started."""


def collect() -> str:
    """Prometheus text of every serving metric on this cluster, each family once."""
    return merge(_texts())


def merge(texts: Iterable[str]) -> str:
    """One text of several nodes' texts: serving families only, each with one head.

    Ray offers every counter as a gauge too, under its name of old; those are left out.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                if not name.startswith(_FAMILIES) or "(DEPRECATED, use " in line:
                    name = ""
                elif name not in heads:
                    heads[name], samples[name] = [line], []
            elif not name:
                continue
            elif not line.startswith("#"):
                samples[name].append(line)
            elif len(heads[name]) == 1:
                heads[name].append(line)
    return "".join(f"{line}\n" for name in heads for line in heads[name] + samples[name])


def read_counts(model_name: str) -> Counts:
    """Speculation counters of every replica that serves or served `model_name` on this cluster.

    Empty when nothing has speculated yet, or when no node offers its metrics.
    """
    from prometheus_client.parser import text_string_to_metric_families

    counts: Counts = {}
    for family in text_string_to_metric_families(collect()):
        if (name := _COUNTERS.get(family.name)) is None:
            continue
        for sample in family.samples:
            if sample.labels.get("model_name") == model_name:
                replica = counts.setdefault(sample.labels["ReplicaId"], {})
                replica[name] = replica.get(name, 0.0) + sample.value
    return counts


def summarise(counts: Counts) -> dict[str, float] | None:
    """Acceptance over all replicas.

    Returns:
        `drafts`, `draft_tokens`, `accepted_tokens` (counts), `acceptance` (accepted per proposed
        token, 0 to 1) and `tokens_per_step` (tokens per pass of the target: 1 + accepted / drafts);
        None where nothing was proposed.
    """
    total = {
        name: sum(replica.get(name, 0.0) for replica in counts.values())
        for name in _COUNTERS.values()
    }
    if not total["draft_tokens"]:
        return None
    return {
        **total,
        "acceptance": total["accepted_tokens"] / total["draft_tokens"],
        "tokens_per_step": 1 + total["accepted_tokens"] / total["drafts"],
    }


def _texts() -> Iterator[str]:
    """What each living node offers."""
    import httpx
    import ray

    for node in ray.nodes():
        if not node["Alive"]:
            continue
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            yield httpx.get(address, timeout=5, trust_env=False).text
        except httpx.HTTPError:
            continue

"""How well the draft guesses, as the serving engines count it.

vLLM counts inside each replica; Ray collects the counters of every node and offers them as
Prometheus text, a few seconds late. Knows their names, not how the service was started.
"""

_COUNTERS = {
    "ray_vllm_spec_decode_num_drafts": "drafts",
    "ray_vllm_spec_decode_num_draft_tokens": "draft_tokens",
    "ray_vllm_spec_decode_num_accepted_tokens": "accepted_tokens",
}
"""Name of Ray's counter (vLLM's, with `ray_` before and `_` for `:`) -> ours."""

Counts = dict[str, dict[str, float]]
"""Replica id -> counter -> value since that replica started."""


def read_counts(model_name: str) -> Counts:
    """Speculation counters of every replica that serves or served `model_name` on this cluster.

    Empty when nothing has speculated yet, or when no node offers its metrics.
    """
    import httpx
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    counts: Counts = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = httpx.get(address, timeout=5, trust_env=False).text
        except httpx.HTTPError:
            continue
        for family in text_string_to_metric_families(text):
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

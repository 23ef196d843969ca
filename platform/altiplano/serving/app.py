"""From the `serve` section and model directories to Ray Serve deployments.

    HAProxy -> Front -> (Serve handle) -> Target of a model <-> Draft of a model (a socket)

Knows which deployments there are and what Serve does with them (replicas, queues, scaling,
draining), not what happens inside. Importing Ray Serve costs a second or two, on the first call.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.serving import ServeSection
from altiplano.serving.check import Part

if TYPE_CHECKING:
    from ray.serve import Application

_HEALTH_PERIOD_S = 2.0
"""How soon a dead engine is noticed; a look at it costs microseconds."""
_METRICS_INTERVAL_S = 1.0
"""How often replicas tell the autoscaler their load."""


def build_application(section: ServeSection, parts: list[Part]) -> "Application":
    """Build the OpenAI-compatible application: the HTTP side, the models, their drafts."""
    from ray import serve

    from altiplano.serving.front.app import Front

    front = serve.deployment(serve.ingress()(Front)).options(
        name="Front",
        num_replicas=section.http_replicas,
        max_ongoing_requests=section.limits.max_requests + 16,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=section.drain_s,
        health_check_period_s=_HEALTH_PERIOD_S,
        max_constructor_retry_count=1,
    )
    models = [
        {
            "name": part.entry.name,
            "model_dir": str(part.model_dir),
            "task": part.entry.task,
            "entry": part.entry.model_dump(),
        }
        for part in parts
    ]
    return front.bind(
        section.model_dump(),
        models,
        [_target(section, part) for part in parts],
        [_draft(section, part) for part in parts if has_draft_replica(part)],
    )


def build_page(api_url: str, votes: Path) -> "Application":
    """Build the chat page, an application of its own under `/chat`.

    Args:
        api_url: where the page's replica reaches the service.
        votes: folder in which the arena keeps its votes.
    """
    from ray import serve

    from altiplano.serving.page.app import Page

    page = serve.deployment(serve.ingress()(Page)).options(
        name="Page",
        num_replicas=1,
        # Every open tab holds a request or two, and none of them is worth waiting for at the end.
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=2,
        ray_actor_options={"num_cpus": 0},
        max_constructor_retry_count=1,
    )
    return page.bind(api_url, str(votes))


def has_draft_replica(part: Part) -> bool:
    """Whether its draft is a deployment of its own."""
    return part.draft_dir is not None and part.entry.draft.placement == "replica"


def deployment_name(kind: str, model_name: str) -> str:
    """Name of a model's deployment, of characters that Serve and metrics take."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]', '-', model_name)}"


def needed_resources(section: ServeSection, parts: list[Part]) -> dict[str, float]:
    """CPUs and GPUs that the fewest replicas take together."""
    need = {"CPU": 0.0, "GPU": 0.0}
    for part in parts:
        entry = part.entry
        need["CPU"] += entry.min_replicas * entry.cpus_per_replica
        need["GPU"] += entry.min_replicas * entry.gpus_per_replica
        if has_draft_replica(part):
            need["CPU"] += entry.draft.min_replicas * entry.draft.num_cpus
            need["GPU"] += entry.draft.min_replicas * entry.draft.num_gpus
    return need


def _target(section: ServeSection, part: Part) -> "Application":
    from ray import serve

    from altiplano.serving.target import Target

    entry = part.entry
    options: dict[str, Any] = {
        "name": deployment_name("Target", entry.name),
        "autoscaling_config": {
            "min_replicas": entry.min_replicas,
            "max_replicas": entry.max_replicas,
            "target_ongoing_requests": entry.target_ongoing_requests,
            "upscale_delay_s": entry.upscale_delay_s,
            "downscale_delay_s": entry.downscale_delay_s,
            "metrics_interval_s": _METRICS_INTERVAL_S,
            "look_back_period_s": max(entry.upscale_delay_s, 2 * _METRICS_INTERVAL_S),
        },
        "max_ongoing_requests": entry.max_ongoing_requests,
        "max_queued_requests": entry.max_queued_requests,
        "graceful_shutdown_timeout_s": section.drain_s,
        "health_check_period_s": _HEALTH_PERIOD_S,
        # A busy engine may be slow to say that it is well.
        "health_check_timeout_s": 60,
        # What stops an engine from starting is seldom gone at the second try.
        "max_constructor_retry_count": 1,
        "ray_actor_options": {
            "num_cpus": entry.cpus_per_replica,
            "num_gpus": entry.gpus_per_replica,
        },
    }
    if entry.prefix_routing:
        from ray.serve.config import RequestRouterConfig

        options["request_router_config"] = RequestRouterConfig(
            request_router_class="altiplano.serving.routing.PrefixRouter"
        )
    draft = str(part.draft_dir) if part.draft_dir and entry.draft.placement != "none" else None
    return (
        serve.deployment(Target)
        .options(**options)
        .bind(entry.model_dump(), str(part.model_dir), draft, section.data_host)
    )


def _draft(section: ServeSection, part: Part) -> "Application":
    from ray import serve

    from altiplano.serving.draft import Draft

    entry = part.entry
    settings = entry.draft
    return (
        serve.deployment(Draft)
        .options(
            name=deployment_name("Draft", entry.name),
            autoscaling_config={
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "upscale_delay_s": entry.upscale_delay_s,
                "downscale_delay_s": entry.downscale_delay_s,
                "metrics_interval_s": _METRICS_INTERVAL_S,
                "policy": {"policy_function": "altiplano.serving.draft:scale_by_busy"},
            },
            health_check_period_s=_HEALTH_PERIOD_S,
            max_constructor_retry_count=1,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        )
        .bind(entry.model_dump(), str(part.draft_dir), section.data_host)
    )

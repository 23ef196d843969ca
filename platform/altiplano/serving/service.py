"""Lifecycle of the service on the connected Ray cluster: start, wait until it answers, stop.

Knows Ray Serve's deployments and the HTTP port, not what the engine inside does. A start on two
cores takes about 30 seconds, most of it imports in Serve's and vLLM's processes.
"""

import contextlib
import io
import logging
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altiplano.config.serving import ServeSection
from altiplano.console import console
from altiplano.errors import ServeError
from altiplano.serving import metrics
from altiplano.serving.app import needed_resources
from altiplano.serving.check import Part
from altiplano.serving.failure import describe_failure, log_folder
from altiplano.serving.target import machines, require_reachable

APPLICATION = "altiplano"
"""Name of the Serve application."""
PAGE_APPLICATION = "altiplano-chat"
"""Name of the chat page's, where there is one."""
_QUIET_SERVE = {"log_level": "WARNING", "enable_access_log": False}
_POLL_S = 0.3
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    """`http://host:port`; the OpenAI routes are under `/v1`."""
    model_name: str
    """Name clients give in `model`."""
    startup_s: float
    """Seconds from the call of `start` to the first answer."""
    _earlier: frozenset[str] = field(repr=False)
    """Replicas of an earlier service whose counters this cluster still shows."""

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish open requests, end the replicas and free the port.

        Args:
            timeout_s: how long to wait for the port, in seconds.
        """
        _shut_down()
        host, port = self.url.split("://", 1)[1].rsplit(":", 1)
        deadline = time.monotonic() + timeout_s
        while not _is_free(host.strip("[]"), int(port)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def speculation_metrics(self, report_interval_s: float = 11.0) -> dict[str, float] | None:
        """How well the draft guessed in all requests answered so far, as the engines counted it.

        Replicas report every 10 s, so a report that is newer than this call is waited for; where
        nothing was asked since the last one, none comes and the interval runs out.

        Args:
            report_interval_s: longest time between two reports, in seconds.

        Returns:
            As `metrics.summarise`; None where the engine does not speculate or no node tells.
        """
        known = self._counts()
        deadline = time.monotonic() + report_interval_s
        fresh = False
        while not fresh and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            now = self._counts()
            fresh = bool(now) and all(now[replica] != known.get(replica) for replica in now)
        # A report's counters arrive one after the other.
        time.sleep(_POLL_S)
        return metrics.summarise(self._counts())

    def _counts(self) -> metrics.Counts:
        now = metrics.read_counts(self.model_name)
        return {replica: now[replica] for replica in now.keys() - self._earlier}


def start(section: ServeSection, parts: list[Part], *, may_grow: bool = False) -> Service:
    """Start the service on the connected Ray cluster and wait until it answers.

    Whatever ends the wait early (an error, the time limit, Ctrl-C) also takes the service down.

    Args:
        section: the `serve` section.
        parts: as from `check.find_parts`; every node must be able to read them.
        may_grow: the cluster may get more nodes, so that a lack of CPUs is no reason to refuse.

    Raises:
        ServeError: the port is in use, Serve runs on this cluster already, the cluster is too
            small, or the deployment failed or was not healthy within `startup_timeout_s`.
    """
    from ray import serve

    started = time.monotonic()
    logging.getLogger(serve.__name__).setLevel(logging.WARNING)
    _require_idle_cluster()
    require_free_port(section.host, section.port)
    require_reachable(section.data_host, machines())
    _require_resources(section, parts, may_grow)
    names = tuple(part.entry.name for part in parts)
    earlier = frozenset(replica for name in names for replica in metrics.read_counts(name))
    host = _ANY_ADDRESS.get(section.host, section.host)
    url = f"{'https' if section.tls_key else 'http'}://{host}:{section.port}"
    with console.status("starting the service") as status:
        try:
            serve.start(http_options=_http_options(section), logging_config=dict(_QUIET_SERVE))
            serve.run_many(
                _targets(section, parts, url),
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _wait_until_running(section, started, status)
            _wait_until_answering(url, started + section.startup_timeout_s)
        except BaseException:
            _shut_down()
            raise
    return Service(url, names[0], round(time.monotonic() - started, 1), earlier)


def _targets(section: ServeSection, parts: list[Part], url: str) -> list[Any]:
    from ray import serve

    from altiplano.serving.app import build_application, build_page

    application = build_application(section, parts)
    targets = [serve.RunTarget(application, name=APPLICATION, route_prefix="/")]
    if section.page:
        votes = Path("runs/arena").resolve()
        targets.append(
            serve.RunTarget(build_page(url, votes), name=PAGE_APPLICATION, route_prefix="/chat")
        )
    return targets


def _http_options(section: ServeSection) -> dict[str, Any]:
    options: dict[str, Any] = {"host": section.host, "port": section.port}
    if section.tls_key:
        options |= {"ssl_keyfile": section.tls_key, "ssl_certfile": section.tls_certificate}
    return options


def _require_resources(section: ServeSection, parts: list[Part], may_grow: bool) -> None:
    """Refuse at once what would otherwise wait for a place until the time is up."""
    import ray

    have, need = ray.cluster_resources(), needed_resources(section, parts)
    short = {name: amount for name, amount in need.items() if amount > have.get(name, 0.0) + 1e-6}
    if not short:
        return
    told = ", ".join(
        f"{amount:g} {name}s where the cluster has {have.get(name, 0.0):g}"
        for name, amount in short.items()
    )
    message = (
        f"the fewest replicas need {told}: lower serve.min_replicas, serve.cpus_per_replica or "
        f"serve.draft.num_cpus, or give the cluster more"
    )
    if not may_grow:
        raise ServeError(message)
    console.log(f"{message}; waiting for it to grow")


def _shut_down() -> None:
    """End Serve on this cluster.

    Its controller dies while it answers, and Ray prints that, by a thread of its own, as an error.
    """
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()):
        serve.shutdown()
        time.sleep(_POLL_S)


def serve_until_interrupted(service: Service) -> int:
    """Keep serving until Ctrl-C or SIGTERM, then stop.

    Call it from the main thread.

    Returns:
        Exit code 0: being told to stop is no failure.
    """
    told = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in signals}
    try:
        while not told.wait(1.0):
            pass
        console.print("stopping the service")
        service.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def how_to_call(service: Service, section: ServeSection) -> str:
    """A curl line, a Python snippet, the page and how to stop, ready to paste."""
    url, model = service.url, service.model_name
    question = '{"role": "user", "content": "Hello"}'
    keyed = section.keys.file is not None
    header = ' -H "Authorization: Bearer $ALTIPLANO_API_KEY"' if keyed else ""
    key = 'os.environ["ALTIPLANO_API_KEY"]' if keyed else '"none"'
    page = f"\nChat page: {url}/chat\n" if section.page else ""
    return f"""\
curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
  -d '{{"model": "{model}", "messages": [{question}]}}'

{"import os" + chr(10) if keyed else ""}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={key})
answer = client.chat.completions.create(model="{model}", messages=[{question}])
print(answer.choices[0].message.content)

altiplano chat --url {url}
{page}
Stop it with Ctrl-C."""


def print_how_to_call(service: Service, section: ServeSection) -> None:
    """Print `how_to_call` as it is: no markup, no wrapping."""
    text = how_to_call(service, section)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _require_idle_cluster() -> None:
    from ray import serve

    running = serve.status()
    if running.proxies or running.applications:
        names = ", ".join(sorted(running.applications)) or "no application"
        raise ServeError(
            f"Ray Serve already runs on this cluster ({names}), with one HTTP port for all: "
            f"stop it with `serve shutdown`, or use another cluster"
        )


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that something listens on, before anything starts.

    Raises:
        ServeError: names the port and how to choose another.
    """
    if not _is_free(host, port):
        raise ServeError(
            f"port {port} on {host} is in use: stop what listens there, or choose another "
            f"port with serve.port={port + 1 if port < 65535 else 8000}"
        )


def _is_free(host: str, port: int) -> bool:
    """Whether this machine could listen there.

    Raises:
        ServeError: the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except socket.gaierror as error:
        raise ServeError(f"serve.host={host} is no address of this machine: {error}") from None
    with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
        # As servers do: connections that are only lingering do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _wait_until_running(section: ServeSection, started: float, status: Any) -> None:
    from ray import serve

    while True:
        applications = serve.status().applications
        if all(each.status == "RUNNING" for each in applications.values()):
            return
        application = next(each for each in applications.values() if each.status != "RUNNING")
        seconds = time.monotonic() - started
        failed = application.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or seconds > section.startup_timeout_s:
            what = "failed to start" if failed else f"was not healthy after {seconds:.0f} s"
            logs = log_folder()
            reason = describe_failure(application, time.time() - seconds, logs)
            raise ServeError(
                f"the service {what}\n{reason}\nmore in {logs}; if it only needs longer, raise "
                f"serve.startup_timeout_s (now {section.startup_timeout_s:g})"
            )
        status.update(f"starting the service ({seconds:.0f} s)")
        time.sleep(_POLL_S)


def _wait_until_answering(url: str, deadline: float) -> None:
    import httpx

    # Whether the certificate is good is the clients' question; here only the port is looked at.
    with httpx.Client(timeout=5, trust_env=False, verify=False) as client:
        while time.monotonic() < deadline:
            try:
                if client.get(f"{url}/health/ready").is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(_POLL_S)
    raise ServeError(
        f"the service runs but {url}/health/ready does not answer: is serve.host an address of the "
        f"machine you are on? more in {log_folder()}"
    )

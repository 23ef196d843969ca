"""Requests made from the OpenAPI document: none breaks the service, every refusal has one form."""

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from altiplano.serving.front.app import make_app
from altiplano.serving.messages import Job
from tests.helpers.fake_target import fake_model, fake_state
from tests.helpers.served_run import write_small_model

_REQUESTS_PER_ROUTE = 30


def _three_tokens(sequence: Sequence[int], job: Job) -> int | None:
    return 300 if len(sequence) < len(job.prompt) + 3 else None


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """The document of an application whose model says three tokens."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_small_model(directory)
    app = make_app(fake_state(fake_model(directory, _three_tokens)))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)


def test_no_request_breaks_the_service(api: schemathesis.BaseSchema) -> None:
    asked: Counter[str] = Counter()
    for found in api.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=_REQUESTS_PER_ROUTE,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            response = case.call()
            asked[case.path] += 1
            _check(response)

        ask()
    assert asked["/v1/chat/completions"] == asked["/v1/completions"] == _REQUESTS_PER_ROUTE
    assert asked.total() > 4 * _REQUESTS_PER_ROUTE


def _check(response: schemathesis.Response) -> None:
    assert response.status_code == 503 or response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
    assert response.headers["x-request-id"]

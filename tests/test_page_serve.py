"""The chat page as Ray Serve runs it: beside another application, under its prefix."""

import contextlib
import io
import socket
from pathlib import Path

import httpx
import pytest

from tests.helpers.fake_service import FakeService, serving
from tools.screenshots import ask, browser, click, enter, missing_programs, text, value, wait


@pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
def test_the_page_works_under_its_prefix(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    from ray import serve

    from altiplano.serving.app import build_page

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    fake = FakeService(word_s=0.02)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        with serving(fake.app()) as api:
            serve.run(build_page(api, tmp_path), name="page", route_prefix="/chat")
            url = f"http://127.0.0.1:{port}/chat"
            upload = httpx.post(f"{url}/gradio_api/upload", content=b"x", trust_env=False)
            assert upload.status_code == 404
            with browser() as driver:
                driver.get(url)
                wait(lambda: value(driver, "chat-model") == "alpha", "the models are offered")
                ask(driver, "chat", "hi")
                assert "one two three four" in text(driver, "chat-box")
                fake.say = lambda _: "word " * 2000
                enter(driver, "chat-question", "go\n")
                wait(lambda: "word word" in text(driver, "chat-box"), "the answer grows")
                click(driver, "chat-stop")
                wait(lambda: fake.abandoned == 1, "the service stops")
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()

"""The chat page in a real browser, against a service without a model: clicks and what they do."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.fake_service import FakeService, serving
from tools.screenshots import (
    ask,
    browser,
    click,
    enter,
    find,
    missing_programs,
    text,
    value,
    wait,
)

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
STORY = "Once upon a time there was a little cat."


@dataclass
class Page:
    """The page in a browser, the service behind it, the folder it keeps."""

    driver: "Chrome"
    fake: FakeService
    url: str
    folder: Path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Open the page once for the file: a start of browser and page costs seconds."""
    from altiplano.serving.page.app import make_page

    fake, folder = FakeService(), tmp_path_factory.mktemp("page")
    with (
        serving(fake.app()) as api,
        serving(make_page(api, data_dir=folder)) as url,
        browser() as driver,
    ):
        yield Page(driver, fake, f"{url}/chat", folder)


@pytest.fixture
def page(opened: Page) -> Page:
    """Give the page as a new visitor sees it, and a service that answers at once."""
    opened.fake.__init__(say=lambda _: STORY)  # type: ignore[misc]
    opened.driver.get(opened.url)
    wait(lambda: value(opened.driver, "chat-model") == "alpha", "the models are offered")
    return opened


def shown(page: Page, box: str = "chat-box") -> list[str]:
    """Texts of the bubbles in a box."""
    return [line for line in text(page.driver, box).splitlines() if line.strip()]


def test_a_conversation_is_sent_whole_and_with_the_settings(page: Page) -> None:
    enter(page.driver, "system", "Be brief.")
    enter(page.driver, "seed", "7")
    ask(page.driver, "chat", "你好")
    assert shown(page)[:2] == ["你好", STORY]
    assert shown(page)[2].startswith("9 tokens · ") and "draft accepted 75%" in shown(page)[2]
    ask(page.driver, "chat", "more")
    roles = [(said["role"], said["content"]) for said in page.fake.asked[-1]["messages"]]
    assert roles == [
        ("system", "Be brief."), ("user", "你好"), ("assistant", STORY), ("user", "more"),
    ]  # fmt: skip
    sent = {"model": "alpha", "temperature": 0.7, "top_p": 0.95, "seed": 7, "stream": True}
    assert page.fake.asked[-1].items() >= sent.items()
    click(page.driver, "chat-again")
    wait(lambda: len(page.fake.asked) == 3, "the answer is asked for again")
    assert page.fake.asked[2] == page.fake.asked[1]
    wait(lambda: find(page.driver, "chat-clear").is_enabled(), "it is complete")
    click(page.driver, "chat-clear")
    wait(lambda: not shown(page), "the box is empty")
    ask(page.driver, "chat", "anew")
    assert len(page.fake.asked[-1]["messages"]) == 2


def test_an_answer_grows_and_stop_ends_it_at_the_service(page: Page) -> None:
    page.fake.word_s, page.fake.say = 0.05, lambda _: "word " * 2000
    enter(page.driver, "chat-question", "go\n")
    lengths: list[int] = []

    def grew() -> bool:
        lengths.append(len(text(page.driver, "chat-box")))
        return len(set(lengths)) > 3

    wait(grew, "the answer grows")
    assert page.fake.abandoned == 0
    click(page.driver, "chat-stop")
    wait(lambda: page.fake.abandoned == 1, "the service stops")
    wait(lambda: "stopped after" in text(page.driver, "chat-box"), "the page says so")
    assert "word word" in text(page.driver, "chat-box")
    assert find(page.driver, "chat-send").is_enabled()


def test_a_visitor_who_leaves_ends_the_answer(page: Page) -> None:
    page.fake.word_s, page.fake.say = 0.05, lambda _: "word " * 2000
    enter(page.driver, "chat-question", "go\n")
    wait(lambda: "word" in text(page.driver, "chat-box"), "the answer begins")
    page.driver.get("about:blank")
    wait(lambda: page.fake.abandoned == 1, "the service stops")


def test_text_is_never_a_page(page: Page) -> None:
    """Neither the visitor's nor the model's; and nothing is fetched from elsewhere."""
    page.driver.get_log("performance")
    page.driver.get(page.url)
    wait(lambda: value(page.driver, "chat-model"), "the page is there")
    nasty = (
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
        "![a](http://127.0.0.1:9/a.png) <b>bold</b> &amp; $$x$$ **two**   three"
    )
    page.fake.say = lambda _: f"{nasty} <img src='http://127.0.0.1:9/b.png'>"
    ask(page.driver, "chat", nasty)
    assert shown(page)[0] == nasty
    assert shown(page)[1].startswith(nasty)
    assert page.driver.execute_script("return window.hacked") is None
    assert not page.driver.execute_script(
        "return document.querySelectorAll('#chat-box [data-testid] img, #chat-box script').length"
    )
    asked = [
        said["params"]["request"]["url"]
        for entry in page.driver.get_log("performance")
        if (said := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    here = page.url.removesuffix("/chat")
    assert len(asked) > 20
    assert {url for url in asked if not url.startswith((here, "data:"))} == set()


def test_the_browser_itself_refuses_other_servers(page: Page) -> None:
    said = page.driver.execute_async_script(
        """
        const tell = arguments[0];
        document.addEventListener("securitypolicyviolation", event => tell(event.blockedURI));
        const image = new Image();
        image.onload = () => tell("loaded");
        image.src = "http://127.0.0.1:9/x.png";
        """
    )
    assert said == "http://127.0.0.1:9/x.png"


def test_a_wrong_key_is_one_line_and_a_right_one_is_not_kept(page: Page) -> None:
    page.fake.key, page.fake.models = "sk-secret", ("alpha", "beta", "lora")
    page.driver.get(page.url)
    wait(lambda: "API key" in value(page.driver, "status"), "the page asks for a key")
    enter(page.driver, "key", "sk-secret\n")
    wait(lambda: value(page.driver, "chat-model") == "alpha", "the models are offered")
    ask(page.driver, "chat", "hi")
    assert shown(page)[1] == STORY
    kept = "return JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie"
    assert "sk-secret" not in page.driver.execute_script(kept)
    page.driver.refresh()
    wait(lambda: "API key" in value(page.driver, "status"), "a new visit asks again")


def test_beam_search_and_completion(page: Page) -> None:
    enter(page.driver, "beams", "3\t")
    click(page.driver, "tab-completion-button")
    enter(page.driver, "completion-text", "The cat")
    click(page.driver, "completion-go")
    wait(lambda: value(page.driver, "completion-result") == STORY, "the completion is there")
    sent: dict[str, Any] = {"prompt": "The cat", "use_beam_search": True, "n": 3}
    assert page.fake.asked[0].items() >= sent.items()
    click(page.driver, "completion-keep")
    wait(lambda: value(page.driver, "completion-text") == f"The cat{STORY}", "it is added")


def test_a_vote_changes_the_table_and_reveals_the_blind(page: Page) -> None:
    click(page.driver, "tab-arena-button")
    find(page.driver, "arena-blind", "input").click()
    ask(page.driver, "arena", "hi")
    assert {body["model"] for body in page.fake.asked} == {"alpha", "beta"}
    assert shown(page, "arena-box-left")[:2] == shown(page, "arena-box-right")[:2] == ["hi", STORY]
    assert value(page.driver, "arena-name-left") == "Model A"
    click(page.driver, "arena-vote-right")
    wait(lambda: "the vote counts" in value(page.driver, "arena-note"), "the vote counts")
    (vote,) = (page.folder / "elo.jsonl").read_text().splitlines()
    said = json.loads(vote)
    assert (said["winner"], said["blind"]) == ("right", True)
    assert value(page.driver, "arena-name-right") == f"Model B: {said['right']}"
    wait(lambda: said["right"] in text(page.driver, "arena-table"), "the table is there")
    rows = text(page.driver, "arena-table")
    assert rows.index(said["right"]) < rows.index(said["left"])
    assert not find(page.driver, "arena-vote-right").is_enabled()


def test_the_page_fits_a_phone(page: Page) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        ask(page.driver, "chat", "supercalifragilisticexpialidocious" * 5)
        width = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

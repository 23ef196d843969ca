"""The chat page's parts without a browser: the arena's table, the client, what the shield stops."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.serving.page.arena import START, Vote, Votes, Winner, table
from altiplano.serving.page.client import Answer, Question, Service, ServiceError, Settings, watch
from altiplano.serving.page.shield import Shield
from tests.helpers.fake_service import FakeService, serving

WINNERS: list[Winner] = ["left", "right", "tie", "bad"]
MIRRORED: dict[Winner, Winner] = {"left": "right", "right": "left", "tie": "tie", "bad": "bad"}
PLAIN = Settings()
VOTES = st.lists(
    st.tuples(st.permutations(["a", "b", "c"]), st.sampled_from(WINNERS)).map(
        lambda drawn: Vote(drawn[0][0], drawn[0][1], drawn[1])
    ),
    min_size=1,
    max_size=60,
)


@given(VOTES)
def test_the_table_does_not_depend_on_order_or_sides(votes: list[Vote]) -> None:
    mirrored = [Vote(vote.right, vote.left, MIRRORED[vote.winner]) for vote in reversed(votes)]
    given, again = ({line.model: line for line in table(each)} for each in (votes, mirrored))
    assert given.keys() == again.keys()
    for name, line in given.items():
        assert again[name].rating == pytest.approx(line.rating, abs=1e-3)
        assert again[name].margin == pytest.approx(line.margin, abs=1e-3)
        assert (again[name].votes, again[name].won) == (line.votes, pytest.approx(line.won))
    assert sum(line.votes for line in given.values()) == 2 * len(votes)


@given(VOTES)
def test_a_won_vote_never_lowers_a_rating(votes: list[Vote]) -> None:
    before = {line.model: line.rating for line in table(votes)}
    after = {line.model: line.rating for line in table([*votes, Vote("a", "b", "left")])}
    if "a" in before:
        assert after["a"] >= before["a"] - 1e-6


def test_ratings_are_on_the_scale_of_elo() -> None:
    """Ten wins for one loss are 400 points apart, but for the prior's pull."""
    votes = [Vote("a", "b", "left")] * 1000 + [Vote("a", "b", "right")] * 100
    best, worst = table(votes)
    assert (best.model, best.votes, best.won) == ("a", 1100, pytest.approx(10 / 11))
    assert best.rating - worst.rating == pytest.approx(400, abs=2)
    assert best.rating + worst.rating == pytest.approx(2 * START)


def test_more_votes_narrow_the_interval_and_a_spotless_record_is_finite() -> None:
    few, many = (table([Vote("a", "b", "left")] * count)[0] for count in (3, 300))
    assert START < few.rating < many.rating < 3000
    ties = [table([Vote("a", "b", "tie")] * count)[0].margin for count in (4, 40, 400)]
    assert ties == sorted(ties, reverse=True)


def test_votes_outlive_a_killed_writer(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "page")
    assert votes.read() == []
    first, second = Vote("模型", "b", "left", blind=True), Vote("a", "b", "bad")
    votes.add(first)
    with (tmp_path / "page" / "elo.jsonl").open("ab") as file:
        file.write(b'{"left": "a", "ri')
    assert votes.read() == [first]
    votes.add(second)
    assert votes.read() == [first, second]


def answer(fake: FakeService, key: str = "", settings: Settings = PLAIN, **asked: Any) -> Answer:
    async def run(url: str) -> Answer:
        service, into = Service(url), Answer()
        question = Question(asked.pop("model", "alpha"), settings, **asked)
        async for _ in watch(service, key, [(question, into)]):
            pass
        await service.close()
        return into

    with serving(fake.app()) as url:
        return asyncio.run(run(url))


def test_an_answer_has_its_text_counts_and_speed() -> None:
    for asked in ({"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}):
        got = answer(FakeService(), **asked)
        assert (got.text, got.tokens, got.acceptance) == ("one two three four", 4, 0.75)
        assert got.done and not got.error and got.first_s is not None
        assert got.note().startswith("4 tokens · ") and "draft accepted 75%" in got.note()


def test_only_what_was_chosen_is_asked_for() -> None:
    fake = FakeService()
    answer(fake, prompt="hi")
    assert fake.asked[-1].keys() == {"model", "prompt", "stream", "stream_options"}
    settings = Settings(0.5, 0.9, 7, 1.1, 20, 3)
    answer(fake, settings=settings, prompt="hi")
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.1}
    assert fake.asked[-1].items() >= (chosen | {"max_tokens": 20, "seed": 3}).items()


def test_beam_search_is_asked_for_whole() -> None:
    fake = FakeService()
    got = answer(fake, settings=Settings(0.5, beams=4), messages=[{"role": "user", "content": "?"}])
    assert got.text == "one two three four" and got.first_s is None
    assert fake.asked[0].items() >= {"use_beam_search": True, "n": 4}.items()
    assert "temperature" not in fake.asked[0] and not fake.asked[0].get("stream")


def test_what_goes_wrong_is_one_line() -> None:
    locked = FakeService(key="sk-1")
    assert "asks for a valid API key" in answer(locked, prompt="hi").error
    assert answer(locked, key=" sk-1\n", prompt="hi").error == ""
    assert "ASCII" in answer(locked, key="clé", prompt="hi").error
    assert answer(FakeService(), model="x", prompt="hi").error == "the model x does not exist"
    silent = asyncio.run(_ask_nobody())
    assert "does not answer" in silent and "\n" not in silent


async def _ask_nobody() -> str:
    service = Service("http://127.0.0.1:9")
    with pytest.raises(ServiceError) as refused:
        await service.models("")
    return str(refused.value)


def test_an_abandoned_answer_ends_at_the_service() -> None:
    fake = FakeService(word_s=0.02, say=lambda _: "word " * 500)

    async def run(url: str, stop: bool) -> Answer:
        service, into = Service(url), Answer()
        progress = watch(service, "", [(Question("alpha", Settings(), prompt="hi"), into)])
        async for _ in progress:
            if into.text and stop:
                into.stop()
            elif into.text:
                await progress.aclose()
        await service.close()
        return into

    with serving(fake.app()) as url:
        for number, stop in enumerate((True, False), 1):
            got = asyncio.run(run(url, stop))
            assert got.stopped and got.done and got.note().startswith("stopped")
            assert 0 < len(got.text) < 5 * 500
            asyncio.run(_until(lambda number=number: fake.abandoned == number))


async def _until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.02)


def shield(method: str, path: str, **headers: str) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of one request through a shield around something that says yes."""
    sent: list[dict[str, Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
    asyncio.run(Shield(inside, "/chat")(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_shield_opens_only_what_the_page_needs() -> None:
    for path in ("/chat/", "/chat/assets/x.js", "/chat/gradio_api/queue/data"):
        status, headers = shield("GET", path)
        assert status == 200
        policy = headers[b"content-security-policy"].decode()
        assert "default-src 'none'" in policy and "http" not in policy
    for path in ("upload", "proxy=http://x", "file=/etc/passwd", "api/x", "vibe-code", "runs"):
        for method in ("GET", "POST"):
            assert shield(method, f"/chat/gradio_api/{path}", content_length="2")[0] == 404
    assert shield("GET", "/chat/monitoring")[0] == 404
    assert shield("DELETE", "/chat/")[0] == 404


def test_the_shield_bounds_bodies_and_sends_to_the_folder() -> None:
    join = "/chat/gradio_api/queue/join"
    assert shield("POST", join, content_length="1000")[0] == 200
    assert shield("POST", join, content_length=str(2 << 20))[0] == 413
    assert shield("POST", join)[0] == 411
    status, headers = shield("GET", "/chat")
    assert (status, headers[b"location"]) == (307, b"/chat/")


def test_a_service_that_dies_in_an_answer_is_one_line_and_keeps_the_text() -> None:
    async def dying(scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [(b"content-type", b"text/event-stream")]})
        chunk = b'data: {"choices": [{"index": 0, "text": "Once"}]}\n\n'
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        raise ConnectionResetError

    async def run(url: str) -> Answer:
        service, into = Service(url), Answer()
        await service.answer("", Question("alpha", PLAIN, prompt="hi"), into)
        return into

    with serving(dying) as url:
        got = asyncio.run(run(url))
    assert got.text == "Once" and "the service does not answer" in got.error

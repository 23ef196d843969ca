"""API keys and rates: who is let in, how often, and what a changed or broken key file does."""

import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.serving import KeySettings, LimitSettings
from altiplano.errors import ServeError
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.keys import KeyRing, add_key, make_key, read_keys
from altiplano.serving.front.limits import Bucket, check_request


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ring(file: Path, clock: Clock, **settings: int) -> KeyRing:
    return KeyRing(KeySettings(file=str(file), **settings), clock=clock)


def refusal(keys: KeyRing, secret: str | None) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        keys.caller(secret)
    return refused.value.status, refused.value.code


def test_a_key_opens_and_nothing_like_it_does(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = add_key(file, "web", admin=True)
    add_key(file, "other")
    keys = ring(file, Clock())
    caller = keys.caller(secret)
    assert (caller.name, caller.admin) == ("web", True)
    for wrong in (secret[:-1], secret + "x", secret.swapcase(), "", None, "\udcff"):
        assert refusal(keys, wrong)[0] == 401
    assert refusal(keys, None)[1] == "missing_api_key"


def test_the_file_holds_no_key_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = add_key(file, "web", requests_per_minute=3)
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    line = json.loads(file.read_text())
    assert line.keys() == {"name", "sha256", "requests_per_minute"}


def test_two_keys_differ_and_a_name_is_taken_once(tmp_path: Path) -> None:
    assert make_key("a")[0] != make_key("a")[0]
    add_key(tmp_path / "keys", "a")
    with pytest.raises(ServeError, match="has a key named a"):
        add_key(tmp_path / "keys", "a")


def test_an_expired_key_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    old = add_key(file, "old", expires=datetime.now(UTC) - timedelta(seconds=1))
    new = add_key(file, "new", expires=datetime.now(UTC) + timedelta(hours=1))
    keys = ring(file, Clock())
    assert refusal(keys, old) == (401, "expired_api_key")
    assert keys.caller(new).name == "new"


def test_a_key_opens_the_models_it_names(tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys", "a", models=["small"])
    caller = ring(tmp_path / "keys", Clock()).caller(secret)
    assert caller.may_use("small")
    assert not caller.may_use("large")


def test_a_changed_file_is_read_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys", Clock()
    first = add_key(file, "first")
    keys = ring(file, clock)
    second = add_key(file, "second")
    assert refusal(keys, second)[0] == 401
    clock.now += 2
    assert keys.caller(second).name == "second"

    kept = file.read_text()
    file.write_text(kept + '{"name": "third"}\n')
    clock.now += 2
    with caplog.at_level(logging.ERROR, "altiplano.keys"):
        assert keys.caller(first).name == "first"
    assert "line 3 is no key: sha256" in caplog.text
    file.unlink()
    clock.now += 2
    assert keys.caller(first).name == "first"

    file.write_text(kept.splitlines()[1] + "\n")
    clock.now += 2
    assert refusal(keys, first)[0] == 401
    assert keys.caller(second).name == "second"


def test_others_who_may_write_the_file_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    add_key(file, "a")
    os.chmod(file, 0o666)
    with caplog.at_level(logging.WARNING, "altiplano.keys"):
        ring(file, Clock())
    assert "others may write" in caplog.text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# ours\n\nnot json", "line 3 is no key"),
        ('{"name": "a", "sha256": "zz"}', "sha256"),
        ('{"name": "a", "sha256": "' + "0" * 64 + '", "admn": true}', "admn"),
        (('{"name": "a", "sha256": "' + "0" * 64 + '"}\n') * 2, "stands there twice"),
    ],
)
def test_a_key_file_is_refused_by_line_and_never_quoted(
    tmp_path: Path, text: str, what: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ServeError, match=what) as refused:
        read_keys(file)
    assert "not json" not in str(refused.value)


def test_no_file_is_an_open_api_and_admin_only_on_loopback() -> None:
    assert KeyRing(KeySettings(), "127.0.0.1").caller(None).admin
    assert KeyRing(KeySettings(), "localhost").caller("whatever").admin
    assert not KeyRing(KeySettings(), "0.0.0.0").caller(None).admin
    assert not KeyRing(KeySettings(), "10.0.0.1").caller(None).admin


def test_requests_beyond_the_rate_wait_as_long_as_they_are_told(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    secret = add_key(file, "a", requests_per_minute=6)
    other = add_key(file, "b")
    keys = ring(file, clock, requests_per_minute=2)
    for _ in range(6):
        keys.caller(secret).admit()
    with pytest.raises(ApiError, match="6 requests a minute") as refused:
        keys.caller(secret).admit()
    assert (refused.value.status, refused.value.headers()["retry-after"]) == (429, "10")
    clock.now += 9.9
    with pytest.raises(ApiError):
        keys.caller(secret).admit()
    clock.now += 0.1
    keys.caller(secret).admit()
    # The other key has the service's rate, and a minute of its own.
    keys.caller(other).admit()
    keys.caller(other).admit()
    with pytest.raises(ApiError, match="2 requests a minute"):
        keys.caller(other).admit()


def test_tokens_that_were_used_are_paid_back_before_the_next_request(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    secret = add_key(file, "a", tokens_per_minute=60)
    keys = ring(file, clock)
    caller = keys.caller(secret)
    caller.admit()
    caller.charge(100)
    assert caller.charged == 100
    with pytest.raises(ApiError, match="60 tokens a minute") as refused:
        keys.caller(secret).admit()
    assert refused.value.kind == "tokens"
    assert refused.value.headers()["retry-after"] == "41"
    clock.now += 41
    keys.caller(secret).admit()


def test_http_replicas_share_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = add_key(file, "a", requests_per_minute=10)
    keys = KeyRing(KeySettings(file=str(file)), shares=5, clock=Clock())
    keys.caller(secret).admit()
    keys.caller(secret).admit()
    with pytest.raises(ApiError):
        keys.caller(secret).admit()


@given(
    per_minute=st.floats(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 50)), max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    """Whoever waits as told takes at most a minute's worth plus what time refilled."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken = 0.0
    for pause, wanted in steps:
        clock.now += pause
        wanted = min(wanted, per_minute)
        wait = bucket.wait_s(wanted)
        assert 0 <= wait <= 60 + 1e-6
        clock.now += wait
        assert bucket.wait_s(wanted) <= 1e-6
        bucket.take(wanted)
        taken += wanted
        assert taken <= per_minute * (1 + clock.now / 60) + 1e-6


def test_what_one_request_may_ask_for() -> None:
    def ask(limits: LimitSettings, prompt: int, tokens: int | None, answers: int = 1) -> int:
        return check_request(
            limits,
            100,
            prompt_tokens=prompt,
            max_tokens=tokens,
            answers=answers,
            default_max_tokens=16,
        )

    free = LimitSettings()
    assert ask(free, 10, 90) == 90
    assert ask(free, 10, None) == 16
    assert ask(free, 99, None) == 1
    assert ask(LimitSettings(max_tokens=5), 10, None) == 5
    for limits, prompt, tokens, answers, what in [
        (free, 100, 1, 1, "100 tokens and may have 99"),
        (free, 10, 91, 1, "`max_tokens` is 91 and may be 90"),
        (free, 0, 1, 1, "empty"),
        (free, 1, 1, 17, "17 answers"),
        (LimitSettings(max_tokens=5), 10, 6, 1, "6 and may be 5"),
        (LimitSettings(max_prompt_tokens=9), 10, 6, 1, "10 tokens and may have 9"),
    ]:
        with pytest.raises(ApiError, match=what) as refused:
            ask(limits, prompt, tokens, answers)
        assert refused.value.status == 400

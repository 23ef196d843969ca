"""The terminal chat: commands, settings, keys, against a service without a model."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from altiplano.chat import HELP, KEY_VARIABLE, chat
from altiplano.errors import ServeError
from tests.helpers.fake_service import FakeService, serving


@dataclass
class Terminal:
    """A service, and a way to type lines at it."""

    fake: FakeService
    url: str
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def type(self, *lines: str, interactive: bool = False, **given: Any) -> str:
        """What the chat prints when these lines are typed, or piped."""
        typed = io.StringIO("".join(f"{line}\n" for line in lines))
        if interactive:
            self.patch.setattr(typed, "isatty", lambda: True, raising=False)
        self.patch.setattr("sys.stdin", typed)
        chat(self.url, **given)
        return self.capture.readouterr().out


@pytest.fixture
def terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Terminal]:
    fake = FakeService()
    with serving(fake.app()) as url:
        yield Terminal(fake, url, monkeypatch, capsys)


def said(body: dict[str, Any]) -> list[str]:
    """Texts of a request's messages."""
    return [message["content"] for message in body["messages"]]


ANSWER = "one two three four"


def test_piped_questions_print_answers_only(terminal: Terminal) -> None:
    printed = terminal.type("a", "", "b", "/clear", "/help", "/set", "c", "/exit", "never")
    assert printed == f"{ANSWER}\n" * 3
    asked = [said(body) for body in terminal.fake.asked]
    assert asked == [["a"], ["a", ANSWER, "b"], ["c"]]


def test_commands_change_what_is_asked(terminal: Terminal) -> None:
    settings = ("/set temperature 0.7", "/set top_k 5", "/set seed 3", "/set seed")
    terminal.type("a", "/system be brief", *settings, "/model beta", "b", system="first", seed=9)
    first, second = terminal.fake.asked
    assert (said(first), first["seed"], first["model"]) == (["first", "a"], 9, "alpha")
    assert "temperature" not in first
    assert (said(second), second["model"]) == (["be brief", "b"], "beta")
    assert (second["temperature"], second["top_k"]) == (0.7, 5) and "seed" not in second


def test_regenerate_asks_the_last_question_again(terminal: Terminal) -> None:
    terminal.type("a", "b", "/regenerate", "c")
    asked = [said(body) for body in terminal.fake.asked]
    assert asked[1] == asked[2] == ["a", ANSWER, "b"]
    assert asked[3] == ["a", ANSWER, "b", ANSWER, "c"]


def test_interactive_shows_help_models_and_speed(terminal: Terminal) -> None:
    lines = ("/help", "/model", "/set", "/set seed x", "/nonsense", "/regenerate", "a")
    printed = terminal.type(*lines, interactive=True, temperature=0.5)
    for line in HELP.splitlines():
        assert line.split("  ")[0] in printed
    assert "* alpha" in printed and "  beta" in printed and "temperature 0.5" in printed
    assert "seed is a number, not 'x'" in printed and "no command /nonsense" in printed
    assert "no question to answer again" in printed
    assert ANSWER in printed and "4 tokens, " in printed and "tokens/s" in printed
    assert len(terminal.fake.asked) == 1


def test_a_refused_question_is_not_remembered(terminal: Terminal) -> None:
    terminal.type("a", "/exit", interactive=True, model="nobody")
    terminal.fake.asked.clear()
    with pytest.raises(ServeError, match="the model nobody does not exist"):
        terminal.type("a", model="nobody")
    with pytest.raises(ServeError, match="offers no model x, but alpha, beta"):
        terminal.type("/model x")
    with pytest.raises(ServeError, match="there is no setting heat, but temperature"):
        terminal.type("/set heat 1")


def test_an_answer_cannot_steer_the_terminal(terminal: Terminal) -> None:
    terminal.fake.say = lambda _: "\x1b[2Jab\x07\n[bold]你好[/bold]\x9b"
    assert terminal.type("a") == "[2Jab\n[bold]你好[/bold]\n"


def test_a_line_with_a_path_is_a_question(terminal: Terminal) -> None:
    terminal.type("/usr/bin holds what?")
    assert said(terminal.fake.asked[0]) == ["/usr/bin holds what?"]


def test_the_key_comes_from_the_environment(terminal: Terminal) -> None:
    terminal.fake.key = "sk-1"
    with pytest.raises(ServeError, match=KEY_VARIABLE):
        terminal.type("a")
    terminal.patch.setenv(KEY_VARIABLE, "sk-1")
    assert terminal.type("a") == f"{ANSWER}\n"


def test_cutting_an_answer_short_ends_it_at_the_service(terminal: Terminal) -> None:
    import time

    from altiplano import chat as module

    terminal.fake.word_s, terminal.fake.say = 0.01, lambda _: "word " * 500
    printed = module.console.print

    def interrupt(*pieces: Any, **given: Any) -> None:
        printed(*pieces, **given)
        if pieces and "word" in str(pieces[0]):
            raise KeyboardInterrupt

    terminal.patch.setattr(module.console, "print", interrupt)
    assert terminal.type("a") == "word\n"
    deadline = time.monotonic() + 20
    while not terminal.fake.abandoned and time.monotonic() < deadline:
        time.sleep(0.02)
    assert terminal.fake.abandoned == 1

"""Talk to a running service in the terminal.

Knows the OpenAI routes, not who serves them. Interactive with a prompt; with piped input every line
is one question and only the answers are printed. An API key is read from ALTIPLANO_API_KEY, never
from the command line, where other users of the machine could see it. Costs the import of openai
(about a second).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from altiplano.console import console
from altiplano.errors import ServeError

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "ALTIPLANO_API_KEY"
HELP = """\
/system TEXT      set the system prompt, and begin anew; without TEXT there is none
/model NAME       ask another model; without NAME the models are listed
/set NAME VALUE   choose how to answer; without VALUE the service does; /set alone shows all
/regenerate       answer the last question again
/clear            forget the conversation
/help             this list
/exit             leave (as does Ctrl-D); Ctrl-C cuts an answer short"""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SETTINGS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
}
_STEERING = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_BEYOND_OPENAI = ("top_k", "repetition_penalty")


def chat(
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
) -> None:
    """Ask question after question, with the conversation so far, until /exit or end of input.

    Args:
        url: address of the service, with or without `/v1`.
        model: name of the model; by default the first that the service offers.
        system: system message.
        max_tokens: longest answer; by default until the model ends it or its context is full.
        temperature, seed: how tokens are drawn; by default as the service does.

    Raises:
        ServeError: the service cannot be reached, or (piped input) refused a question or a command.
    """
    client = _connect(url)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    interactive = sys.stdin.isatty()
    talk = _Talk(
        client=client,
        model=model or _models(client, url)[0],
        url=url,
        system=system or "",
        settings={name: value for name, value in given.items() if value is not None},
        interactive=interactive,
    )
    if interactive:
        console.print(f"[bold]{talk.model}[/bold] at {url}; /help lists the commands")
    for line in _lines(interactive):
        if line == "/exit":
            return
        try:
            talk.take(line)
        except ServeError as error:
            if not interactive:
                raise
            console.print(str(error), style="red", markup=False)


@dataclass
class _Talk:
    """A conversation: what was said, and how to go on."""

    client: "OpenAI"
    model: str
    url: str
    system: str
    settings: dict[str, float]
    interactive: bool
    said: list[dict[str, str]] = field(default_factory=list)
    """Questions and answers in turn."""

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            ServeError: the service refused the question, or the command is wrong.
        """
        commands = {
            "/clear": self._clear,
            "/help": self._help,
            "/model": self._choose,
            "/regenerate": self._again,
            "/set": self._set,
            "/system": self._instruct,
        }
        name, _, rest = line.partition(" ")
        if name in commands:
            commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            raise ServeError(f"there is no command {name}: /help lists them")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        asked = [*self.said, {"role": "user", "content": question}]
        answer = self._answer(asked)
        self.said = [*asked, {"role": "assistant", "content": answer}]

    def _answer(self, asked: list[dict[str, str]]) -> str:
        """Print the answer as it comes; Ctrl-C cuts it short, also at the service."""
        from openai import OpenAIError

        pieces: list[str] = []
        tokens, begun = 0, 0.0
        try:
            with self.client.chat.completions.create(**self._words(asked)) as stream:
                for chunk in stream:
                    if chunk.choices and (piece := chunk.choices[0].delta.content):
                        begun = begun or time.monotonic()
                        pieces.append(piece)
                        _show(piece)
                    if chunk.usage:
                        tokens = chunk.usage.completion_tokens
        except KeyboardInterrupt:
            pass
        except OpenAIError as error:
            raise ServeError(_refusal(error)) from None
        console.print()
        # The first token waited for the prompt, so the rate is that of the others.
        if self.interactive and tokens > 1 and (spent := time.monotonic() - begun) > 0:
            rate = (tokens - 1) / spent
            console.print(f"{tokens} tokens, {rate:.1f} tokens/s", style="dim", highlight=False)
        return "".join(pieces)

    def _words(self, asked: list[dict[str, str]]) -> dict[str, Any]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        extra = {name: self.settings[name] for name in _BEYOND_OPENAI if name in self.settings}
        known = {name: self.settings[name] for name in self.settings.keys() - extra.keys()}
        return {
            "model": self.model,
            "messages": opening + asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": extra,
            **known,
        }

    def _again(self, rest: str) -> None:
        if not self.said:
            raise ServeError("there is no question to answer again")
        asked = self.said[:-1]
        self.said = [*asked, {"role": "assistant", "content": self._answer(asked)}]

    def _clear(self, rest: str) -> None:
        self.said = []

    def _instruct(self, rest: str) -> None:
        self.system, self.said = rest, []

    def _choose(self, rest: str) -> None:
        offered = _models(self.client, self.url)
        if rest in offered:
            self.model = rest
        elif rest:
            raise ServeError(f"the service offers no model {rest}, but {', '.join(offered)}")
        else:
            self._say("\n".join(f"{'*' if name == self.model else ' '} {name}" for name in offered))

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            values = (
                f"{key} {self.settings.get(key, '(as the service does)')}" for key in _SETTINGS
            )
            self._say("\n".join(values))
        elif name not in _SETTINGS:
            raise ServeError(f"there is no setting {name}, but {', '.join(_SETTINGS)}")
        elif not value:
            self.settings.pop(name, None)
        else:
            try:
                self.settings[name] = _SETTINGS[name](value)
            except ValueError:
                raise ServeError(f"{name} is a number, not {value!r}") from None

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _say(self, text: str) -> None:
        """Print what is no answer: piped output holds answers only."""
        if self.interactive:
            console.print(text, markup=False, highlight=False)


def _show(piece: str) -> None:
    """Print a piece of an answer; what would steer the terminal is left out."""
    plain = piece.translate(_STEERING)
    console.print(plain, end="", markup=False, highlight=False, soft_wrap=True)


def _connect(url: str) -> "OpenAI":
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment has no way to this machine's loopback.
    loopback = urlsplit(url).hostname in _LOOPBACK
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    return OpenAI(
        base_url=base,
        api_key=os.environ.get(KEY_VARIABLE) or "none",
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=not loopback),
    )


def _models(client: "OpenAI", url: str) -> list[str]:
    """Names of what the service offers, at least one."""
    from openai import APIConnectionError, OpenAIError

    try:
        offered = [model.id for model in client.models.list()]
    except APIConnectionError as error:
        raise ServeError(
            f"no service answers at {url} ({error}): start one with `altiplano serve runs/NAME`, "
            f"or give its address with --url"
        ) from None
    except OpenAIError as error:
        raise ServeError(_refusal(error)) from None
    if not offered:
        raise ServeError(f"the service at {url} offers no model")
    return offered


def _refusal(error: Exception) -> str:
    from openai import AuthenticationError

    if isinstance(error, AuthenticationError):
        return f"the service asks for a valid API key: put yours into {KEY_VARIABLE} ({error})"
    return f"the service refused the question: {error}"


def _lines(interactive: bool) -> Iterator[str]:
    """Lines that are not empty, until the input ends."""
    while True:
        try:
            line = console.input("[bold]> [/bold]") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line and not interactive:
            return
        if line.strip():
            yield line.strip()

"""Talk to a running service in the terminal.

Knows the OpenAI routes, not who serves them. Interactive with a prompt; with piped input every line
is one question and only the answers are printed. Costs the import of openai (about a second).
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from altiplano.console import console
from altiplano.errors import ServeError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def chat(
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
) -> None:
    """Ask question after question, with the conversation so far, until /exit or end of input.

    Args:
        url: address of the service, with or without `/v1`.
        model: name of the model; by default the first that the service offers.
        system: system message.
        max_tokens: longest answer; by default until the model ends it or its context is full.

    Raises:
        ServeError: the service cannot be reached, or (piped input) refused a question.
    """
    client = _connect(url)
    name = model or _first_model(client, url)
    opening: list[ChatCompletionMessageParam] = []
    if system:
        opening.append({"role": "system", "content": system})
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[bold]{name}[/bold] at {url}; /clear forgets, /exit leaves")
    for question in _questions(interactive):
        if question == "/exit":
            return
        if question == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _ask(client, name, messages, max_tokens)
        except ServeError as error:
            if not interactive:
                raise
            messages.pop()
            console.print(str(error), style="red", markup=False)
            continue
        messages.append({"role": "assistant", "content": answer})


def _connect(url: str) -> "OpenAI":
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment has no way to this machine's loopback.
    loopback = urlsplit(url).hostname in _LOOPBACK
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    return OpenAI(
        base_url=base,
        api_key="none",
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=not loopback),
    )


def _first_model(client: "OpenAI", url: str) -> str:
    from openai import OpenAIError

    try:
        offered = [model.id for model in client.models.list()]
    except OpenAIError as error:
        raise ServeError(
            f"no service answers at {url} ({error}): start one with `altiplano serve runs/NAME`, "
            f"or give its address with --url"
        ) from None
    if not offered:
        raise ServeError(f"the service at {url} offers no model")
    return offered[0]


def _questions(interactive: bool) -> Iterator[str]:
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


def _ask(
    client: "OpenAI",
    model: str,
    messages: "list[ChatCompletionMessageParam]",
    max_tokens: int | None,
) -> str:
    """Print the answer as it comes; Ctrl-C cuts it short."""
    from openai import OpenAIError

    pieces: list[str] = []
    try:
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=max_tokens, stream=True
        )
        for chunk in stream:
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                pieces.append(piece)
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pass
    except OpenAIError as error:
        raise ServeError(f"the service refused the question: {error}") from None
    console.print()
    return "".join(pieces)

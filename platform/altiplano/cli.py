"""The command line: parse, call, print. Nothing heavy is imported until a command needs it.

Users' errors end as one message and exit code 1; Ctrl-C as 130 with nothing lost.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from altiplano.cli_tokenizer import tokenizer_app
from altiplano.errors import AltiplanoError

if TYPE_CHECKING:
    from altiplano.config import Project


class _Commands(TyperGroup):
    """All commands; users' errors end here, before typer turns Ctrl-C into a silent exit."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Teach a LLaMA-type model a new language on one Ray cluster, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare and look at training data.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, over the YAML.", show_default=False)
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join; RAY_ADDRESS otherwise.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Run it even if it is up to date.")]


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    start: Annotated[str | None, typer.Option("--from", help="First stage; runs again.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Last stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    address: Address = None,
) -> None:
    """Run every stage that is not up to date, from raw text to a servable model."""
    from altiplano import commands

    commands.run(_load(config, overrides), start, until, dry_run=dry_run, address=address)


def _stage_command(verb: str, summary: str) -> Callable[..., None]:
    """A command that runs the stages of one verb."""

    def command(
        config: ConfigArgument,
        overrides: Overrides = None,
        force: Force = False,
        address: Address = None,
    ) -> None:
        from altiplano import commands

        commands.run_verb(_load(config, overrides), verb, force=force, address=address)

    command.__doc__ = summary
    return command


for _verb, _summary in {
    "extend": "Give the base model rows for the new pieces.",
    "pretrain": "Continue pre-training, stage by stage.",
    "sft": "Tune on instructions.",
    "merge": "Merge the adapters into one model.",
    "draft": "Make the draft model for speculative decoding.",
    "evaluate": "Measure before and after.",
}.items():
    app.command(_verb)(_stage_command(_verb, _summary))


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="The YAML, a finished run or a model directory.")],
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Serve a finished run over HTTP (OpenAI routes) until Ctrl-C."""
    from altiplano import commands

    commands.serve(target, overrides or [], address=address)


@app.command(name="serve-key")
def serve_key(
    file: Annotated[Path, typer.Argument(help="Key file; made where there is none.")],
    name: Annotated[str, typer.Argument(help="Whose key it is; names, not secrets, are logged.")],
    admin: Annotated[bool, typer.Option(help="May read /metrics and load adapters.")] = False,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests per minute.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per minute.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="May use; again for more.")] = None,
    expires: Annotated[datetime | None, typer.Option(help="In UTC.")] = None,
) -> None:
    """Make an API key for the service (serve.keys.file); it is shown once."""
    from altiplano.serving.front.keys import add_key

    secret = add_key(
        file,
        name,
        admin=admin,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        models=model or None,
        expires=expires.replace(tzinfo=UTC) if expires else None,
    )
    print(secret)


@app.command()
def verify(artifacts: Annotated[list[Path], typer.Argument(help="Artifact directories.")]) -> None:
    """Recompute every hash of artifacts and say what differs."""
    from altiplano import commands

    commands.verify(artifacts)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    timed: Annotated[
        bool, typer.Option("--calibrate", help="Time one block here, and estimate the speed.")
    ] = False,
) -> None:
    """What a config will train, and what it will take, before anything is started."""
    from altiplano import commands

    commands.plan(_load(config, overrides), as_json=as_json, timed=timed)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The service.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; the first served.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(help="The same draws every time.")] = None,
) -> None:
    """Talk to a served model in the terminal (API key: ALTIPLANO_API_KEY)."""
    from altiplano.chat import chat as talk

    talk(url, model, system, max_tokens=max_tokens, temperature=temperature, seed=seed)


@data_app.command("prepare")
def data_prepare(
    config: ConfigArgument,
    overrides: Overrides = None,
    force: Force = False,
    address: Address = None,
) -> None:
    """Tokenise and pack texts and instruction records."""
    from altiplano import commands

    commands.run_verb(_load(config, overrides), "data", force=force, address=address)


@data_app.command("preview")
def data_preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(help="How many records.")] = 3,
) -> None:
    """Show records as the model sees them, the trained tokens coloured."""
    from altiplano import commands

    commands.data_preview(_load(config, overrides), records)


def main() -> None:
    """Console entry point."""
    app()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors a user can mend into one message and an exit code."""
    try:
        yield
    except AltiplanoError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; finished stages are kept, run the same command again to go on", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        where = f" at {error.filename}" if error.filename else ""
        reason = os.strerror(error.errno)
        _fail(f"cannot read or write{where}: {reason}; nothing finished was lost", 1)


def _fail(message: str, code: int) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)
    sys.exit(code)


def _plain(message: str) -> str:
    from rich.markup import escape

    return escape(message)


def _load(config: Path, overrides: list[str] | None) -> "Project":
    from altiplano.config import load_config

    return load_config(config, overrides)


if __name__ == "__main__":
    main()

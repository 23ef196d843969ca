"""The whole line in one go: run a config, serve what it made, ask it over HTTP, clean up.

Uses the same commands as the command line does. Costs the run plus half a minute for the service.
"""

import time
from pathlib import Path

from altiplano import commands
from altiplano.cluster import connect
from altiplano.config import Project, load_config
from altiplano.console import console, simple_table
from altiplano.errors import ServeError
from altiplano.evaluate.report import Results, read_report, report_table
from altiplano.pipeline import build_stages, exclusive, run_stages
from altiplano.serving.check import find_parts
from altiplano.serving.environment import prepare
from altiplano.serving.service import Service, print_how_to_call, serve_until_interrupted, start
from altiplano.stages.stage import artifact_path


def run_demo(config: Path, overrides: list[str], *, keep: bool) -> None:
    """Run every stage that is not up to date, serve, ask, and stop (or keep serving).

    Args:
        keep: serve until Ctrl-C instead of stopping.
    """
    started = time.monotonic()
    project = load_config(config, overrides)
    section = project.config.serve
    prepare(section)
    with exclusive(project), connect(project.config.cluster):
        run_stages(project, build_stages(project))
        console.rule("[bold]serve", align="left")
        parts = find_parts(section, project.output)
        service = start(section, parts)
        results = read_report(artifact_path(project, "evaluate"))
        answers = _ask_all(service, results, project.config.evaluate.max_tokens_per_answer)
        speculation = service.speculation_metrics() if parts[0].draft_dir else None
        _show(project, results, answers, speculation)
        console.print(f"the whole took {time.monotonic() - started:.0f} s")
        if keep:
            print_how_to_call(service, section)
            serve_until_interrupted(service)
        else:
            service.stop()
            console.print(
                f"nothing is left running; to serve it again: "
                f"altiplano serve {commands.shown(project.output)}"
            )


def _ask_all(service: Service, results: Results, max_tokens: int) -> list[tuple[str, str, str]]:
    """(question, what the base said, the answer over HTTP) for the report's samples."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=60)
    said = []
    for sample in results.samples:
        try:
            reply = client.chat.completions.create(
                model=service.model_name,
                messages=[{"role": "user", "content": sample.prompt}],
                max_tokens=max_tokens,
                temperature=0,
            )
        except OpenAIError as error:
            raise ServeError(f"the service did not answer {sample.prompt!r}: {error}") from None
        answer = (reply.choices[0].message.content or "").strip()
        said.append((sample.prompt, sample.before, answer))
    return said


def _show(
    project: Project,
    results: Results,
    answers: list[tuple[str, str, str]],
    speculation: dict[str, float] | None,
) -> None:
    """The final table and the answers."""
    table = report_table(results)
    if speculation:
        rate = speculation["acceptance"]
        table.add_row("draft: proposals accepted, as served", "-", f"{rate:.1%}")
    console.print(table)
    header = ("question", "the base says", "answer over HTTP")
    console.print(simple_table(f"{project.config.name}: answers", header, answers))

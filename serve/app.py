"""The service as application builders, for `serve run`, `serve deploy` and a RayService.

    serve run serve.app:build artifact=runs/demo max_replicas=2
    serve run --route-prefix /chat --name chat serve.app:build_page

Arguments of `build` are `artifact` (a finished run or a model directory) and the keys of the
config's `serve` section; host and port are Serve's own there. Knows only `altiplano.serving`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application

_SOURCES = Path(__file__).resolve().parent.parent / "platform"


def build(args: dict[str, Any]) -> "Application":
    """Build the OpenAI-compatible application.

    Args:
        args: `artifact` (unless `models` names all), and any key of `ServeSection`; values may be
            strings, and a dot reaches into a section (`draft.placement=replica`).

    Raises:
        ServeError: nothing to serve, a key is unknown, or the parts cannot be served.
        ArtifactError, MismatchError: as `altiplano.serving.check.check_parts`.
    """
    _find_library()
    from altiplano.serving.app import build_application
    from altiplano.serving.check import find_parts

    settings = dict(args)
    artifact = settings.pop("artifact", None)
    # Serve binds the port, to an address not known here: nothing may rest on its being loopback
    # (without API keys the administrator's routes do).
    section = _section({"host": "0.0.0.0", **settings})
    parts = find_parts(section, None if artifact is None else Path(artifact))
    return build_application(section, parts)


def build_page(args: dict[str, Any]) -> "Application":
    """Build the chat page, to be deployed under `/chat` beside `build`.

    Args:
        args: `api_url` (of the service; http://127.0.0.1:8000 by default) and `votes` (the folder
            of the arena's votes; runs/arena).
    """
    _find_library()
    from altiplano.errors import ServeError
    from altiplano.serving.app import build_page as page

    settings = {"api_url": "http://127.0.0.1:8000", "votes": "runs/arena", **args}
    if unknown := settings.keys() - {"api_url", "votes"}:
        raise ServeError(f"serve.app:build_page takes api_url and votes, got {sorted(unknown)}")
    return page(settings["api_url"], Path(settings["votes"]).resolve())


def _find_library() -> None:
    # From a checkout that is not installed; an installed altiplano comes first.
    sys.path.append(str(_SOURCES))


def _section(settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from altiplano.config.serving import ServeSection
    from altiplano.errors import ServeError

    try:
        return ServeSection.model_validate(_nested(settings))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(key) for key in item['loc'])}: {item['msg']}" for item in error.errors()
        ]
        raise ServeError(f"arguments of serve.app:build: {'; '.join(problems)}") from None


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"draft.tokens": "3"}` as `{"draft": {"tokens": "3"}}`."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree

"""The service as an application builder, for `serve run`, `serve deploy` and a RayService.

    serve run serve.app:build artifact=runs/demo draft_tokens=4

Arguments are `artifact` (a finished run or a model directory) and the keys of the config's `serve`
section; host and port are Serve's own there. Knows only `altiplano.serving`.
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
        args: `artifact`, and any key of `ServeSection` (values may be strings).

    Raises:
        ServeError: `artifact` is missing, a key is unknown, or the parts cannot be served.
        ArtifactError, MismatchError: as `check_parts`.
    """
    # From a checkout that is not installed; an installed altiplano comes first.
    sys.path.append(str(_SOURCES))
    from pydantic import ValidationError

    from altiplano.config.schema import ServeSection
    from altiplano.errors import ServeError
    from altiplano.serving.check import check_parts, find_parts
    from altiplano.serving.engine import build_application

    settings = dict(args)
    artifact = settings.pop("artifact", None)
    if artifact is None:
        raise ServeError("name what to serve: `serve run serve.app:build artifact=runs/demo`")
    try:
        section = ServeSection.model_validate(settings)
    except ValidationError as error:
        problems = [f"{item['loc'][0]}: {item['msg']}" for item in error.errors()]
        raise ServeError(f"arguments of serve.app:build: {'; '.join(problems)}") from None
    model_dir, draft_dir = find_parts(Path(artifact))
    check_parts(section, model_dir, draft_dir)
    return build_application(section, model_dir, draft_dir)

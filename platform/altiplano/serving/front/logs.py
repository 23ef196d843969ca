"""Log lines of the HTTP side, as JSON, each with the id of the request it belongs to.

The access log has one line per request: who, which model, status, time, tokens; never a prompt, an
answer or a key. Knows nothing of HTTP. A line costs about 20 µs.
"""

import json
import logging
import logging.handlers
import time
from contextvars import ContextVar
from pathlib import Path

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request this task works for; "" outside of one."""

access = logging.getLogger("altiplano.access")
"""One line per request; its fields are in the record's `fields`."""

_MAX_BYTES = 50 * 2**20
_KEPT = 3


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, request, and the message or its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "request": getattr(record, "request", ""),
        }
        fields = getattr(record, "fields", None)
        line.update(fields if fields is not None else {"message": record.getMessage()})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def note_request(record: logging.LogRecord) -> bool:
    """A handler's filter that writes the request's id into every record."""
    record.request = request_id.get()
    return True


def write_logs(file: Path) -> None:
    """Send what `altiplano` loggers of this process say to a file, 4 × 50 MiB of it at most."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=_MAX_BYTES, backupCount=_KEPT)
    handler.setFormatter(JsonLines())
    handler.addFilter(note_request)
    logger = logging.getLogger("altiplano")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    # Ray would print every line at the console that started the service.
    logger.propagate = False

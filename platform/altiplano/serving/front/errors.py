"""Errors as OpenAI's API words them, so that its clients raise the classes they document.

The body is `{"error": {"message", "type", "param", "code"}}` and the status chooses the class (400
BadRequestError, 401, 403, 404, 429, 5xx). Knows HTTP and FastAPI, not what went wrong; errors
nobody foresaw are answered by `guard.py`, without their text.
"""

import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; never a secret, never our internals.
        code: a word programs can compare, e.g. `model_not_found`.
        param: path of the key that is wrong, e.g. `messages.0.content`.
        kind: OpenAI's `type`; by default the status' own.
        retry_after_s: seconds after which asking again may help; sent as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or _KINDS.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer; `Retry-After` in whole seconds, at least one."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error, for an answer's body or for an event of a stream that began already."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer of an error."""
    return JSONResponse(error_body(error), error.status, error.headers())


def install_handlers(app: FastAPI) -> None:
    """Word ApiErrors, bodies of the wrong form, unknown paths and methods as OpenAI does."""

    async def own(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = error_response(_from_http(request, error))
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)


def _from_validation(problems: Sequence[Any]) -> ApiError:
    """The first problem names the key, the others are counted: unions repeat one mistake often."""
    first = problems[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        place = f" at character {path[0]}" if path else ""
        return ApiError(400, f"the body is not JSON: {reason}{place}", code="invalid_json")
    param = ".".join(path) or None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    where = f"`{param}`: " if param else ""
    return ApiError(
        400,
        f"{where}{first['msg'].removeprefix('Value error, ')}{more}",
        code=first["type"],
        param=param,
    )


def _from_http(request: Request, error: HTTPException) -> ApiError:
    place = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {place}; GET /openapi.json lists what there is")
    if error.status_code == 405:
        return ApiError(405, f"{place} is not offered; GET /openapi.json lists what is")
    return ApiError(error.status_code, str(error.detail))

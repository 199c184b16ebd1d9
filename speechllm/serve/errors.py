"""Errors as OpenAI's clients read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request is refused.

    Args:
      status: of HTTP.
      message: what is wrong, and what to do.
      code: a word that programs know it by.
      param: the field of the request that is meant.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What the client is told."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> Response:
        return JSONResponse({"error": self.body()}, self.status, self.headers)


def busy(what: str, code: str, seconds: int = 1) -> APIError:
    """Too much is asked for at the moment: try again after so many seconds."""
    return APIError(429, f"{what}: try again in {seconds} s", code, headers={"Retry-After": str(seconds)})


async def api_error(request: Request, error: Exception) -> Response:
    """The response to an `APIError`, for Starlette."""
    assert isinstance(error, APIError)
    return error.response()


async def http_error(request: Request, error: Exception) -> Response:
    """The same form for what Starlette refuses itself: unknown paths and methods, forms that cannot be read."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    return APIError(
        error.status_code, message, codes.get(error.status_code, "invalid_request"), headers=error.headers
    ).response()


async def unexpected_error(request: Request, error: Exception) -> Response:
    """A mistake of the server: its log has the details."""
    return APIError(500, "the server has failed; its log says how", "server_error").response()

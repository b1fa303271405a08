"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from expertshare.errors import ExpertShareError
from expertshare.serving.scheduling import EngineBusyError, EngineClosedError, Failure

INVALID, OVERLOADED, UNAVAILABLE = "invalid_request_error", "rate_limit_error", "server_unavailable"
_FAILURES = {
    "deadline": (408, "timeout_error", "deadline_exceeded"),
    "shutdown": (503, UNAVAILABLE, "shutting_down"),
    "numerics": (500, "server_error", "numerics"),
    "memory": (503, UNAVAILABLE, "expert_memory"),
    "broken": (500, "server_error", "engine_failed"),
}


class Refusal(ExpertShareError):
    """A request that gets no answer. param: the parameter at fault; code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP response of this refusal."""
        return _AsciiJSON(self.to_json(), status_code=self.status, headers=self.headers)


class _AsciiJSON(JSONResponse):
    """A message may quote a lone surrogate, which UTF-8 does not have."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode("ascii")


def refusal_of(error: ExpertShareError, param: str | None = None) -> Refusal:
    """What the engine or the decoder objects to, as a refusal."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, EngineBusyError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return Refusal(429, str(error), kind=OVERLOADED, code="queue_full", headers=headers)
    if isinstance(error, EngineClosedError):
        return Refusal(503, str(error), kind=UNAVAILABLE, code="not_ready", headers={"Retry-After": "5"})
    return Refusal(400, str(error), param=param)


def refusal_of_failure(failure: Failure) -> Refusal:
    """Why an answer got no further. A client must not repeat by itself what ran into its deadline."""
    status, kind, code = _FAILURES[failure.kind]
    headers = {"x-should-retry": "false"} if failure.kind == "deadline" else {}
    return Refusal(status, failure.message, kind=kind, code=code, headers=headers)

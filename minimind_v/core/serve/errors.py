"""The errors of the server, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, as a name may have, is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Json(JSONResponse):
    """A JSON response."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return encode_json(content)


class ApiError(Exception):
    """A request that is not answered: its status, one line for the client, and the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def as_json(self) -> dict[str, object]:
        """The object that OpenAI's clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        """The response that carries it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Json(self.as_json(), self.status, headers)

"""Requests that are answered with an error, in the OpenAI body that vLLM's routes return."""

from http import HTTPStatus
from typing import Any

from deltamux.serve import compat


class Refused(Exception):
    """A request that is answered with an error before it reaches vLLM.

    Args:
        message: For the client.
        status: HTTP's.
        kind: The error's type.
    """

    def __init__(
        self,
        message: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        kind: str = "BadRequestError",
    ) -> None:
        super().__init__(message)
        self.response = error_response(message, status, kind)


def refusal(error: Exception) -> Any:
    """The answer to a request that is refused."""
    if isinstance(error, Refused):
        return error.response
    return error_response(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")


def unavailable(message: str) -> Any:
    """Service unavailable (503), in vLLM's error body."""
    return error_response(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")


def error_response(message: str, status: HTTPStatus, kind: str) -> Any:
    """An error in the OpenAI body that vLLM's routes return."""
    info = compat.protocol("ErrorInfo")(message=message, type=kind, code=status.value)
    return compat.protocol("ErrorResponse")(error=info)

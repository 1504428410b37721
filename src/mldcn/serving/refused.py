"""Why a request is refused, in the words of both transports."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """A kind of refusal: its HTTP status and the name of its gRPC code."""

    INVALID = (400, "INVALID_ARGUMENT")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED")
    FORBIDDEN = (403, "PERMISSION_DENIED")
    NOT_FOUND = (404, "NOT_FOUND")
    TOO_LARGE = (413, "INVALID_ARGUMENT")
    NO_SUCH_TYPE = (415, "INVALID_ARGUMENT")
    INTERNAL = (500, "INTERNAL")
    BUSY = (503, "RESOURCE_EXHAUSTED")
    NOT_READY = (503, "UNAVAILABLE")
    LATE = (504, "DEADLINE_EXCEEDED")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.value[0]

    @property
    def code(self) -> str:
        """The name of the gRPC code."""
        return self.value[1]


class Refused(Exception):
    """A request that is not answered. The message goes to the client, so it holds nothing of the server's.

    Args:
        reason: the kind.
        message: what is wrong and how to mend it.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, reason: Reason, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


def invalid(message: str) -> Refused:
    """A request that no server would answer."""
    return Refused(Reason.INVALID, message)

"""Connections that end after a while, so that a process that was started later gets its share of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, MutableMapping
from typing import Any

App = Callable[..., Any]
SECONDS = 10.0
_MANY = 10_000


class Aging:
    """An ASGI application whose answers ask for a new connection (``Connection: close``) where theirs is old.

    Nothing is lost by it: the caller learns of it with a whole answer.

    Args:
        app: the application.
        clock: seconds.
    """

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._until: dict[Any, float] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: App, send: App) -> None:
        """Answers a request."""
        caller, now = scope.get("client"), self._clock()
        if len(self._until) > _MANY:  # connections that their callers ended
            self._until = {each: until for each, until in self._until.items() if until > now}
        # Not all at once, where many began together.
        until = self._until.setdefault(caller, now + SECONDS * random.uniform(0.5, 1.5))

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and now >= until:
                self._until.pop(caller, None)
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, sending)

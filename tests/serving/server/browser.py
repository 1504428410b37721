"""Chromium without a window, driven by its own protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Page:
    """A page of the browser; ``messages`` are its errors and warnings, ``asked`` what it loaded or called."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.messages: list[str] = []
        self.asked: list[str] = []

    async def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        async with asyncio.timeout(60):
            while True:
                found = json.loads((await self._socket.receive()).data)
                if found.get("id") == self._number:
                    assert "error" not in found, found
                    return found["result"]
                self._note(found)

    def _note(self, event: dict[str, Any]) -> None:
        facts = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.messages.append(facts["exceptionDetails"].get("text", "") + str(facts["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.messages.append(facts["entry"]["text"])

    async def open(self, url: str) -> None:
        """Goes to a page."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.do(f"{domain}.enable")
        await self.do("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """What an expression gives, awaited."""
        found = await self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        """Waits for an expression to be true."""
        async with asyncio.timeout(60):
            while not (found := await self.run(script)):
                await asyncio.sleep(0.05)
        return found

    async def look(self, width: int, *, dark: bool, file: Path) -> None:
        """A picture of the whole page."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.do("Emulation.setEmulatedMedia", features=scheme)
        await self.size(width)
        shot = await self.do("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    async def size(self, width: int) -> None:
        """The window's width; its height is the page's."""
        facts = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.do("Emulation.setDeviceMetricsOverride", **facts)
        height = await self.run("document.documentElement.scrollHeight")
        await self.do("Emulation.setDeviceMetricsOverride", **{**facts, "height": height})


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Page]:
    """A browser with one page, until the block ends."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            place = Path(folder) / "DevToolsActivePort"
            async with asyncio.timeout(60):
                while not place.exists() or "\n" not in place.read_text():
                    await asyncio.sleep(0.05)
            port = place.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    pages = [each for each in await response.json() if each["type"] == "page"]
                address = pages[0]["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            process.wait(20)

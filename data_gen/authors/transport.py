"""How requests travel: aiohttp below openai's client, as a client of httpx2."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import httpx2
import openai


class HttpClient(openai.DefaultAioHttpClient):
    """openai's aiohttp client, with a limit on a whole request and all failures as httpx2's errors.

    Quicker than the client's own transport, which can hold back the event loop at 100 requests a second.
    """

    def __init__(self, *, timeout: float, longest: float, connections: int) -> None:
        """Connects to nothing yet.

        Args:
            timeout: seconds without a byte of the answer.
            longest: seconds for all of a request: aiohttp sets none for names, proxies and what is sent.
            connections: most at once.
        """
        super().__init__(timeout=httpx2.Timeout(timeout, pool=None), limits=httpx2.Limits(max_connections=connections))
        self._longest = longest

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request.

        Raises:
            httpx2.TimeoutException: no answer in time.
            httpx2.RequestError: no answer of HTTP's form, or a connection that failed.
        """
        try:
            return await asyncio.wait_for(super().send(request, **options), self._longest)
        except asyncio.TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer within {self._longest:g} s", request=request) from error
        except aiohttp.ClientError as error:  # such as a status line that is none
            raise httpx2.RemoteProtocolError(str(error), request=request) from error

"""The offline author as one whom requests are sent to: no key, no network, the same stages, rules and ledger."""

from __future__ import annotations

from data_gen.authors import offline
from data_gen.core.calls import Reply, Request, canonical


class OfflineAuthor:
    """Answers from the knowledge that comes with the package."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def send(self, request: Request) -> Reply:
        """Answers one request; it costs nothing."""
        return Reply(status="ok", text=canonical(offline.answer(request.stage, request.fields, self._seed)))

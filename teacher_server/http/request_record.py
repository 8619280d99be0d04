"""The facts of one score request for its log line and its span: who asked, how much, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from common.protocol.fields import shown
from common.protocol.schema import ScoreRequest
from teacher_server.backends.wire_size import own_tokens
from teacher_server.scoring.checks import RequestRefused


@dataclass(slots=True)
class RequestRecord:
    """Starts with the authenticated tenant. Holds no token ids and no keys; text of the client is cut and escaped."""

    tenant: str
    label: str
    """Value of the metrics' label `run`."""
    run: str = ""
    request_id: str = ""
    items: int = 0
    tokens: int = 0
    status: int = 500
    error: str = ""

    def describe(self, request: ScoreRequest) -> None:
        """Fill in what the decoded request says."""
        self.run, self.request_id = shown(request.run), shown(request.request_id)
        self.items, self.tokens = len(request.items), sum(map(own_tokens, request.items))

    def refuse(self, refusal: RequestRefused) -> None:
        """The request ends with `refusal`."""
        self.status, self.error = refusal.status, refusal.code

    def attributes(self) -> dict[str, str | int]:
        """Attributes of the request's span."""
        return {
            "opcd.tenant": self.tenant,
            "opcd.run": self.run,
            "opcd.request_id": self.request_id,
            "opcd.items": self.items,
            "opcd.tokens": self.tokens,
            "http.response.status_code": self.status,
            "error.type": self.error,
        }

    def __str__(self) -> str:
        return (
            f"tenant={self.tenant} run={self.run} request={self.request_id} items={self.items} tokens={self.tokens} "
            f"status={self.status} error={self.error}"
        )

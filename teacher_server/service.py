"""What the server does, without HTTP: look up, check, queue, answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.config import TeacherConfig
from common.schema import (
    PROTOCOL_VERSION,
    Context,
    Ids,
    ItemError,
    ItemScore,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
)
from teacher_server.backends.base import Backend, Work
from teacher_server.checks import RequestRefused, check_item, check_request
from teacher_server.contexts import ContextRefused, ContextStore, Located
from teacher_server.scheduler import QueueFull, Scheduler

CONTEXT_IDS_BYTES = 256 * 1024 * 1024
"""Bound on the tokens of stored contexts (their states have a bound of their own)."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Fingerprints of the tokenizer that goes with the model."""

    tokenizer: str
    chat_template: str


class TeacherService:
    """One model, its contexts and its queue. `start` and `stop` on the event loop that uses it."""

    def __init__(
        self,
        backend: Backend,
        config: TeacherConfig,
        identity: TokenizerIdentity,
        *,
        thread_setup: Callable[[], None] | None = None,
    ) -> None:
        self._backend = backend
        self._config = config
        self._identity = identity
        self._longest = min(config.max_sequence_tokens or backend.max_sequence_tokens, backend.max_sequence_tokens)
        self.contexts = ContextStore(identity.tokenizer, max_tokens=self._longest, max_bytes=CONTEXT_IDS_BYTES)
        self._thread_setup = thread_setup
        self.scheduler: Scheduler | None = None
        self.draining = False

    def start(self) -> None:
        """Begin to take requests."""
        self.scheduler = Scheduler(
            self._backend,
            batch_tokens=self._config.batch_tokens,
            window_s=self._config.batch_window_ms / 1000,
            max_queued_tokens=self._config.max_queued_tokens,
            context_cache_bytes=self._config.context_cache_bytes,
            thread_setup=self._thread_setup,
        )
        self.scheduler.start()

    async def stop(self) -> None:
        """Take nothing more, finish what is queued."""
        self.draining = True
        if self.scheduler is not None:
            await self.scheduler.stop()

    def info(self) -> TeacherInfo:
        """The handshake."""
        backend, config = self._backend, self._config
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=backend.model_name,
            model_fingerprint=backend.model_fingerprint,
            tokenizer_fingerprint=self._identity.tokenizer,
            chat_template_fingerprint=self._identity.chat_template,
            backend=backend.name,
            dtype=backend.dtype,
            vocab_size=backend.vocab_size,
            max_k=config.max_k,
            max_sequence_tokens=self._longest,
            max_items=config.max_items,
            max_body_bytes=config.max_body_bytes,
            modes=dict(backend.modes),
            kind="frozen",
            weight_version=backend.weight_version,
        )

    def put_context(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store a context; raises RequestRefused."""
        try:
            return self.contexts.put(tenant, name, ids, parent)
        except ContextRefused as error:
            status = 404 if error.code == "unknown_parent" else 422
            raise RequestRefused(status, error.code, str(error)) from error

    async def score(self, tenant: str, request: ScoreRequest) -> ScoreResponse:
        """Score the items that can be scored, say of the others why not; raises RequestRefused for the whole."""
        if self.draining or self.scheduler is None:
            raise RequestRefused(503, "draining", "this teacher is shutting down", retry_after_s=1.0)
        check_request(request, self.info())
        results: list[ItemScore | ItemError | None] = []
        works: list[tuple[Work, Located | None]] = []
        for item in request.items:
            located = self._locate(tenant, item.context)
            context = None if located is None else located.context
            fault = check_item(item, context, request, self.info(), self._backend)
            if fault is None and context is not None and not self.scheduler.cache.fits(context):
                fault = ItemError(
                    "too_long",
                    f"the cache of a context of {context.ids.size} tokens takes more than "
                    f"teacher.context_cache_bytes={self._config.context_cache_bytes}",
                )
            results.append(fault)
            if fault is None:
                works.append((Work(item, None, request.mode, request.temperature, request.k), located))
        try:
            scored = iter(await self.scheduler.submit(tenant, request.run, works)) if works else iter(())
        except QueueFull as error:
            raise RequestRefused(429, "busy", str(error), retry_after_s=error.retry_after_s) from error
        return ScoreResponse(
            request_id=request.request_id,
            model_fingerprint=self._backend.model_fingerprint,
            weight_version=self._backend.weight_version,
            results=tuple(next(scored) if result is None else result for result in results),
        )

    def _locate(self, tenant: str, name: str | None) -> Located | None:
        if name is None:
            return None
        context = self.contexts.get(tenant, name)
        return None if context is None else Located(tenant, context, self.contexts.parents(tenant, context))

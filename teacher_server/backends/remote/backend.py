"""Backend in front of an inference endpoint that somebody else runs: tenants, queues and contexts are the server's, the
forward passes are the endpoint's.

A result with an invalid row is asked for once more, without the endpoint's prefix cache, and is then an error of its
item. The model behind the address is identified at the start and again later (`probe`): scores of another model are
errors.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import files
from common.config.model import TeacherConfig
from common.data.fingerprint import tokenizer_fingerprint
from common.data.model_lookup import load_model_config
from common.protocol.schema import ForwardPathName, Ids, ItemError, ItemScore, ScoreMode, as_ids
from teacher_server.backends.base import BackendError, BackendLost, Work
from teacher_server.backends.remote.completions import max_reply_bytes
from teacher_server.backends.remote.endpoint import Endpoint, EndpointCut, EndpointError
from teacher_server.backends.remote.model import MAX_CONNECTIONS, EndpointModel
from teacher_server.backends.remote.probe import check_determinism, probe_ids
from teacher_server.backends.rows import InvalidRows, item_score, support_error
from teacher_server.backends.salted_prefix import SaltedPrefix

log = logging.getLogger(__name__)

PROBE_EVERY_S = 15.0
"""Age at which the model's identity is checked again before a batch. A vLLM server takes longer than that to start."""


MODES: dict[bool, tuple[ScoreMode, ...]] = {
    True: ("at_ids", "teacher_topk", "union", "sampled"),
    False: ("teacher_topk", "sampled"),
}
"""Modes of an endpoint that scores given ids (`generate`), or only its own best ids (`completions`)."""
PATHS: dict[bool, tuple[ForwardPathName, str]] = {
    True: ("engine", "a context is computed once and stays in the endpoint's prefix cache"),
    False: ("full", "the endpoint computes a context again for every answer: vLLM reads no prefix cache for it"),
}


class RemoteBackend:
    """Scores with an endpoint at temperature 1, at given ids if it can."""

    name = "remote"
    weight_version = 0

    def __init__(self, model: EndpointModel, config: TeacherConfig, tokenizer: Any) -> None:
        """Check the endpoint's model against ``teacher.model``, which `tokenizer` is of. Raises BackendError."""
        self._model = model
        self.dtype: str = "bfloat16" if config.dtype == "auto" else config.dtype
        self.vocab_size = model.vocab_size
        self.model_name = str(config.model)
        self.max_sequence_tokens = model.max_sequence_tokens
        self._probe = probe_ids(tokenizer)[: model.max_sequence_tokens]
        self._changed: str | None = None
        try:
            model.check_tokenizer(tokenizer)
            model.check_modes(self._probe, config.max_k, self.dtype)
            check_determinism(model.sampled_logprobs, self._probe, self.dtype, model.endpoint.address)
            self._identity = model.identify(self._probe)
        except (EndpointError, InvalidRows) as error:
            raise BackendError(str(error)) from error
        self.model_fingerprint = self._identity.fingerprint(tokenizer_fingerprint(tokenizer))
        self._proven = (time.monotonic(), model.endpoint.failures)
        self.path, self.path_cost = PATHS[model.fixed_ids]
        self.modes: Mapping[ScoreMode, tuple[float, ...] | None] = dict.fromkeys(MODES[model.fixed_ids], (1.0,))

    @classmethod
    def load(cls, config: TeacherConfig, tokenizer: Any) -> RemoteBackend:
        """Connect to ``config.endpoint``. Raises BackendError, within seconds if the endpoint is down."""
        model = connect(config)
        try:
            return cls(model, config, tokenizer)
        except BaseException:
            model.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._model.close()

    def restart(self) -> None:
        """Do nothing: requests wait until whoever runs the endpoint has started it again."""

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of the ids."""
        return 4 * tokens

    def embeds(self, ids: Ids) -> bool:
        return int(ids.max(initial=0)) < self.vocab_size

    def prefill(self, parts: Sequence[Ids], parent: SaltedPrefix | None) -> list[SaltedPrefix]:
        """Have the endpoint compute the longest of the prefixes into its cache, if items will read it there."""
        salt = uuid.uuid4().hex if parent is None else parent.salt
        prefixes = []
        for part in parts:
            whole = part if parent is None else np.concatenate([parent.ids, part])
            parent = SaltedPrefix(whole, salt, self.prefix_bytes(int(part.size)))
            prefixes.append(parent)
        if self._model.fixed_ids:
            try:
                self._model.prefill(prefixes[-1].ids, salt)
            except EndpointError as error:  # the items then compute the context, or fail with this error
                log.warning("a context was not computed ahead: %s", error)
        return prefixes

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Results in the order of `batch`, whose items the endpoint gets at once.

        Raises BackendLost if the endpoint seems to die of an item.
        """
        try:
            self._prove(PROBE_EVERY_S)
            results = []
            for result in self._model.at_once(self._score_item, batch, [_reply_bytes(work) for work in batch]):
                if isinstance(result, EndpointCut):
                    raise BackendLost(str(result))
                results.append(result)
            self._prove(float("inf"))  # if a connection broke, another process may have answered a part of the batch
        except EndpointError as error:
            results = [ItemError("internal", str(error)) for _ in batch]
        failed = [result.message for result in results if isinstance(result, ItemError)]
        if failed:
            log.error("%d of %d items have no score, the first: %s", len(failed), len(batch), failed[0])
        return results

    def _score_item(self, work: Work) -> ItemScore | ItemError | EndpointCut:
        if not work.item.response_ids.size:
            return work.empty_score()
        if (fault := support_error(work, self.vocab_size)) is not None:
            return fault
        salt = None if work.prefix is None else work.prefix.salt
        for last in (False, True):
            try:
                rows, settings = self._model.score(work, _sequence(work), salt=None if last else salt)
            except EndpointCut as error:
                return error
            except EndpointError as error:
                return ItemError("internal", str(error))
            except InvalidRows as error:
                if last:
                    return ItemError("internal", f"the endpoint's result is invalid, also the second one: {error}")
                log.warning("the endpoint's result is invalid and is asked for again: %s", error)
            else:
                if settings not in (None, self._identity.system_fingerprint):
                    self._changed = self._another_model(f"a reply has the system_fingerprint {settings}")
                return item_score(rows, work)
        raise AssertionError("the second attempt returns")

    def _prove(self, max_age_s: float) -> None:
        """Check that the model is still that of the start, if a connection broke since the last check or it is older
        than `max_age_s`. Raises EndpointError.
        """
        proven_at, proven_failures = self._proven
        failures = self._model.endpoint.failures
        if self._changed is None and (failures != proven_failures or time.monotonic() - proven_at > max_age_s):
            try:
                change = self._identity.change(self._model.identify(self._probe), self.dtype)
            except (BackendError, InvalidRows) as error:
                raise EndpointError(f"the endpoint's model cannot be checked: {error}") from error
            self._proven = (time.monotonic(), failures)
            if change is not None:
                self._changed = self._another_model(change)
        if self._changed is not None:
            raise EndpointError(self._changed)

    def _another_model(self, change: str) -> str:
        return (
            f"the model behind the endpoint {self._model.endpoint.address} is not that of this teacher's start: "
            f"{change}. Start the teacher again, and the runs that use it"
        )


def connect(config: TeacherConfig) -> EndpointModel:
    """The model at ``config.endpoint``, unchecked. Raises BackendError, within seconds if the endpoint is down."""
    assert config.endpoint is not None
    assert config.model is not None
    path = config.endpoint_key_file
    try:
        endpoint = Endpoint(
            config.endpoint,
            key=None if path is None else files.read_key(path, "teacher.endpoint_key_file"),
            key_file=path,
            ca_file=config.ca_file,
            max_connections=MAX_CONNECTIONS,
        )
        return EndpointModel(
            endpoint,
            name=config.endpoint_model,
            model_config=load_model_config(config.model),
            timeout_s=config.request_timeout_s,
        )
    except (EndpointError, ValueError) as error:
        raise BackendError(str(error)) from error


def _sequence(work: Work) -> Ids:
    """All ids of an item: context, prompt and response."""
    context = as_ids([]) if work.prefix is None else work.prefix.ids
    return as_ids(np.concatenate([context, work.item.prompt_ids, work.item.response_ids]))


def _reply_bytes(work: Work) -> int:
    context = 0 if work.prefix is None else work.prefix.total_tokens
    return max_reply_bytes(context + work.own_tokens, work.teacher_ids)

"""Checks before a run begins: the teacher fits the run, and the key file holds a key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common import files
from common.data.fingerprint import added_token_fault
from common.protocol.schema import PROTOCOL_VERSION, ScoreMode, TeacherInfo
from common.protocol.scoring import TeacherError


def handshake(
    info: TeacherInfo,
    *,
    tokenizer_fingerprint: str,
    added_tokens: Mapping[int, str],
    k: int,
    mode: ScoreMode,
    temperature: float,
    longest_tokens: int,
) -> None:
    """Raise TeacherError, with numbers and remedy, if the teacher does not fit the run."""
    if info.protocol != PROTOCOL_VERSION:
        raise TeacherError(
            f"the teacher speaks protocol {info.protocol}, this run {PROTOCOL_VERSION}: use the same opcd on both sides"
        )
    if info.tokenizer_fingerprint != tokenizer_fingerprint:
        raise TeacherError(
            f"the teacher {info.model} has another tokenizer ({info.tokenizer_fingerprint[:12]}) than the student "
            f"({tokenizer_fingerprint[:12]}): the same token ids mean different text; use models of one family"
        )
    if (fault := added_token_fault(added_tokens, info.added_tokens)) is not None:
        raise TeacherError(f"the teacher {info.model} has another tokenizer: {fault}; use models of one family")
    if mode not in info.modes:
        remedy = "use its transformers backend, or another loss.support"
        if info.backend == "remote":
            remedy = "start the endpoint on GPUs with --enable-scale-out, or set loss.support to `teacher`"
        raise TeacherError(
            f"the teacher's {info.backend} backend cannot score in mode {mode} (it can {', '.join(info.modes)}): "
            f"{remedy}"
        )
    temperatures = info.modes[mode]
    if temperatures is not None and temperature not in temperatures:
        raise TeacherError(
            f"the teacher scores mode {mode} at temperatures {list(temperatures)} only, "
            f"loss.temperature is {temperature}"
        )
    if k > info.max_k:
        raise TeacherError(
            f"loss.top_k is {k}, the teacher takes at most {info.max_k}: lower it, or raise the server's teacher.max_k"
        )
    if longest_tokens > info.max_sequence_tokens:
        raise TeacherError(
            f"the longest sequence (context + prompt + answer) has {longest_tokens} tokens, the teacher takes at most "
            f"{info.max_sequence_tokens}: shorten the context, lower rollout.max_tokens or raise "
            "teacher.max_sequence_tokens"
        )


def read_key(path: Path) -> str:
    """Key from ``teacher.client_key_file``. Raises TeacherError, which never shows the file's content."""
    try:
        return files.read_key(path, "teacher.client_key_file")
    except ValueError as error:
        raise TeacherError(str(error)) from error

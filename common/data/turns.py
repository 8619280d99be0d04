"""Contexts that are turns of a chat (``context.placement: turns``): messages as JSON or YAML. Pure."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import yaml
from pydantic import ValidationError

from common.data.rows import Message
from common.data.sources import DataError
from common.error_text import one_line


@lru_cache(maxsize=8)
def read_turns(text: str) -> tuple[Message, ...]:
    """Read a list of messages, which stands before a row's chat: a system message or none, then turns that end with an
    answer. Raises DataError for any other text, with the number of the message, counted from 1.
    """
    value = _parsed(text)
    if not isinstance(value, list) or not value:
        raise DataError(
            "context.placement `turns` needs a list of messages in JSON or YAML, [{role: user, content: ...}, {role: "
            f"assistant, content: ...}}], not {type(value).__name__ if value != [] else 'an empty list'}"
        )
    turns = []
    for number, one in enumerate(value, start=1):
        try:
            turns.append(Message.model_validate(one))
        except ValidationError as error:
            detail = error.errors()[0]
            column = ".".join(map(str, detail["loc"]))
            message = str(detail["msg"]).removeprefix("Value error, ")
            raise DataError(f"message {number} of the context: {column}: {message}".replace(": : ", ": ")) from error
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise DataError("the context's messages: a system message can only be the first")
    if roles[-1] != "assistant" or "user" not in roles:
        raise DataError(
            "the context's messages must hold a user's turn and end with the assistant's, before the row's chat; "
            f"they are {', '.join(roles)}"
        )
    return tuple(turns)


def looks_like_turns(text: str) -> bool:
    """True if `text` is a list of messages, which another placement would insert as it is written."""
    try:
        value = _parsed(text)
    except DataError:
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)  # YAML reads most JSON, but not its escapes of characters beyond U+FFFF
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"the context is neither JSON nor YAML: {one_line(error)}") from error

"""The coach's function against a stand-in for its endpoint."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from common.data.answer_hook import load_answer_hook
from deploy.tasks import coach


def said(monkeypatch: pytest.MonkeyPatch, text: str) -> list[dict[str, Any]]:
    """Let the coach answer `text`; returns the requests that it gets."""
    asked: list[dict[str, Any]] = []

    def reply(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})

    client = httpx.AsyncClient(base_url="http://coach", transport=httpx.MockTransport(reply))
    monkeypatch.setattr(coach, "_client", lambda: client)
    monkeypatch.setenv("COACH_MODEL", "m")
    return asked


def test_the_insights_of_the_coach_are_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = said(monkeypatch, "<think>- INSIGHT: no</think>Fine.\n- INSIGHT: Name a source.\n - INSIGHT: Be brief.")
    text = asyncio.run(load_answer_hook("deploy.tasks.coach:insights")({"id": "7"}, "Why?", "Because."))
    assert text is not None
    assert "- INSIGHT: Name a source.\n- INSIGHT: Be brief.\n" in text
    assert "no" not in text.splitlines()[1]
    assert "Why?" in asked[0]["messages"][0]["content"]
    assert "Because." in asked[0]["messages"][0]["content"]


def test_without_an_insight_the_answer_is_left_out_and_general_rows_are_not_coached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = said(monkeypatch, "Very good.")
    assert asyncio.run(coach.insights({"id": "general/7"}, "Why?", "Because.")) == coach.GENERAL
    assert asked == []
    assert asyncio.run(coach.insights({"id": "7"}, "Why?", "Because.")) is None

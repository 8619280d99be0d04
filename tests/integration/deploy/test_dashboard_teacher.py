"""A teacher exports the metrics that the Grafana dashboard shows."""

from __future__ import annotations

from pathlib import Path

from tests.support.dashboard import asked_of, exported_by, missing
from tests.support.teacher_running import items, put, running, scored, tokens


async def test_the_teacher_exports_what_is_asked_of_it(tiny_model: Path) -> None:
    with running(tiny_model) as server:
        async with server.http() as http:
            context = server.context(tokens(1, 100))
            assert (await put(http, context)).status_code == 200
            for seed in (1, 2):  # the second time the context's state is there
                await scored(http, items(seed, 2, context=context.hash))
            refused = await http.post("/v1/score", content=b"nothing")
            assert refused.status_code == 400
        async with server.http("operator") as http:
            page = (await http.get("/metrics")).text
    assert missing(asked_of("opcd_teacher_"), exported_by(page)) == []

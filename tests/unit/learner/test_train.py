"""Signals that end a run in order; errors of an evaluation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from common.config.model import Config
from learner import train
from learner.errors import RunError
from learner.train import interruptible
from tests.support.configs import config_of


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_the_run(number: signal.Signals, ignored: bool) -> None:
    """Also in a process that began with SIGINT ignored, as a script's background processes do."""
    cancelled: list[bool] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), number)
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            asyncio.run(run())
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled


def test_an_evaluation_that_another_library_ends_is_one_line(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, config: Config) -> None: ...

        def reserve(self, **_: bool) -> None:
            raise ValueError("\x1b[31mengine core\x1b[0m\nfailed")

        def close(self) -> None: ...

    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "Q: cat\\nA:", "answer": "cats"}')
    source = str(tmp_path / "rows.jsonl")
    config = config_of(
        run={"name": "r", "dir": str(tmp_path)},
        student={"model": str(tiny_model)},
        data={"train": source, "eval": source},
    )
    monkeypatch.setattr(train, "Services", Failing)
    monkeypatch.setattr(train, "cluster", contextlib.nullcontext)
    with pytest.raises(RunError) as caught:
        train.evaluate(config)
    assert str(caught.value).startswith("ValueError: engine core failed (unexpected; the traceback is in ")
    assert "Traceback" in (tmp_path / "r/evaluate/error.txt").read_text()

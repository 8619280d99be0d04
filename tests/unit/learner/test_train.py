"""Signals that end a run in order."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from learner.train import interruptible


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

"""Expected warnings of libraries are dropped, others of the same logger are not."""

from __future__ import annotations

import logging

import pytest

from common.telemetry.library_messages import hide_expected_warnings

NAME = "ray._private.authentication.authentication_token_setup"


def test_only_the_expected_warning_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    hide_expected_warnings()
    hide_expected_warnings()
    with caplog.at_level(logging.WARNING, logger=NAME):
        logging.getLogger(NAME).warning("Token authentication is enabled for this Ray cluster. Set …")
        logging.getLogger(NAME).warning("Token authentication is disabled for this Ray cluster. Anyone …")
    assert [record.getMessage()[:32] for record in caplog.records] == ["Token authentication is disabled"]


def test_the_messages_are_those_of_the_installed_libraries() -> None:
    import inspect

    from deepspeed.accelerator import real_accelerator
    from ray._private.authentication import authentication_token_setup as tokens

    assert tokens.logger.name == NAME
    assert "Token authentication is enabled" in inspect.getsource(tokens)
    assert real_accelerator.accel_logger.name == "DeepSpeed"
    assert '"Setting accelerator to CPU' in inspect.getsource(real_accelerator)

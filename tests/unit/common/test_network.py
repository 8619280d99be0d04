"""Interfaces by address."""

from __future__ import annotations

import os

import pytest

from common.network import interface_of, use_interface_of


def test_the_loopback_device_is_found_and_a_strangers_address_is_not() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_gloo_gets_the_interface_unless_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "recorded, so that the end of the test restores it")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_interface_of("203.0.113.7")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"

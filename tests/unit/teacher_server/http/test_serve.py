"""Loading a model by the teacher's section of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.model import TeacherConfig
from common.protocol.scoring import TeacherError
from teacher_server.backends.base import BackendError
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.http.serve import build_service


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_layers_lie_where_the_device_map_says(tiny_model: Path, where: str) -> None:
    service = build_service(TeacherConfig(model=str(tiny_model), device_map=where, threads=1))
    assert service.device == torch.device("cpu")
    with pytest.raises(TeacherError, match=r"does not fit on the devices of teacher\.device_map `meta`"):
        build_service(TeacherConfig(model=str(tiny_model), device_map="meta", threads=1))


def test_a_device_that_is_not_there_is_named(tiny_model: Path) -> None:
    with pytest.raises(TeacherError, match="cannot be loaded"):
        build_service(TeacherConfig(model=str(tiny_model), device_map="no-such-place", threads=1))


def test_a_model_that_does_not_fit_its_devices_is_refused(tiny_untied_model: Path) -> None:
    """With GPUs that are too small, `auto` would fetch layers in every forward pass."""
    spread: Any = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(BackendError, match=r"does not fit.*1 of its tensors"):
        TransformersBackend.load(str(tiny_untied_model), device_map=spread)

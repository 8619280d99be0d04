"""The garbage collector skips what is old, not what a block makes."""

from __future__ import annotations

import gc
import weakref

from common.garbage import skip_present_objects


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_old_objects_are_skipped_and_new_garbage_is_collected() -> None:
    old = Cycle()
    watched_old, before = weakref.ref(old), gc.get_freeze_count()
    with skip_present_objects():
        assert gc.get_freeze_count() > before + 10_000
        watched = weakref.ref(Cycle())
        del old
        gc.collect()
        assert watched() is None
        assert watched_old() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert watched_old() is None

"""Host memory between steps."""

from __future__ import annotations

import ctypes

_LIBRARY = ctypes.CDLL(None)


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library can.

    glibc keeps what a step's activations took, for the next step: on CPU that is close to half of the weights' and the
    optimiser's memory, which engines and teachers on the same machine may need meanwhile.
    """
    trim = getattr(_LIBRARY, "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)

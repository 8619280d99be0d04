"""The learner: the driver of a run (Ray, asyncio, no tensors) and the trainer (torch) that its ranks run.

Rooms import one way: experience → train → loop → evaluation → cluster → {trainer, data, publishing}.
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m learner.train`, which puts the working folder first on Python's path
    from opcd_start import refuse_hidden_packages

    refuse_hidden_packages()

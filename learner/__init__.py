"""The learner: the driver of a run (Ray, asyncio, no tensors) and the trainer (torch) that its ranks run.

Rooms import one way: experience → train → loop → evaluation → cluster → {trainer, data, publishing}.
"""

"""The actors of a run and their placement: ranks, teachers, rollout workers behind one `Services`.

The only room that imports the other services; within the learner it imports `trainer`, `publishing` and `data`.
"""

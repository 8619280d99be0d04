"""The client of a teacher server: `TeacherClient` talks to it, `TeacherScorerFactory` travels to rollout workers.

What is named here may be imported by a run (and nothing else of this service).
"""

from teacher_server.client.client import LOST_AFTER_S, TeacherClient
from teacher_server.client.handshake import handshake, read_key
from teacher_server.client.scorer import TeacherScorer, TeacherScorerFactory

__all__ = ["LOST_AFTER_S", "TeacherClient", "TeacherScorer", "TeacherScorerFactory", "handshake", "read_key"]

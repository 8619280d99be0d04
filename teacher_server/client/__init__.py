"""The teacher client: `TeacherClient` sends requests, `TeacherScorerFactory` makes the scorer of a rollout worker.

May import common, teacher_server.backends.wire_size and teacher_server.http.headers. A run imports only these names.
"""

from teacher_server.client.client import LOST_AFTER_S, TeacherClient
from teacher_server.client.handshake import handshake, read_key
from teacher_server.client.scorer import TeacherScorer, TeacherScorerFactory

__all__ = ["LOST_AFTER_S", "TeacherClient", "TeacherScorer", "TeacherScorerFactory", "handshake", "read_key"]

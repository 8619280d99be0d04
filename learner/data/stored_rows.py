"""Training rows in a temporary file, so that memory does not grow with their texts."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from common.data.rows import DataError, Row

IN_MEMORY_BYTES = 16 << 20
"""Size from which the file lies on disk."""


class StoredRows(Sequence[Row]):
    """Rows that are added once and unpickled from the file whenever they are read.

    Memory holds 24 bytes a row, and the file while it is smaller than `IN_MEMORY_BYTES`. On disk it has no name, and
    vanishes with the process. A source that changes during a run does not change the rows.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115  open as long as the rows
        self._ends = array("q", [0])
        self.prompt_characters = array("q")
        """Characters of each row that the student sees."""
        self.own_characters = array("q")
        """Characters of each row's own context, or of its teacher's chat."""
        self.games: list[int] = []
        """Indices of the rows with an environment."""
        self.extend(rows)

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows. Raises what reading them raises, and DataError if the disk has no room for them."""
        self._file.seek(self._ends[-1])
        for row in rows:
            stored = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
            try:
                self._file.write(stored)
            except OSError as error:
                raise DataError(
                    f"cannot keep the training rows in a temporary file under {tempfile.gettempdir()}: "
                    f"{error.strerror}: set the environment variable TMPDIR to a folder with more room"
                ) from error
            if row.environment is not None:
                self.games.append(len(self))
            self._ends.append(self._ends[-1] + len(stored))
            self.prompt_characters.append(characters_of(row))
            self.own_characters.append(own_characters_of(row))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._ends[index], self._ends[index + 1]
        self._file.seek(start)
        row: Row = pickle.loads(self._file.read(end - start))
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def characters_of(row: Row) -> int:
    """Count the characters of the row that the student sees."""
    return len(row.prompt or "") + sum(len(message.content) for message in row.messages or ())


def own_characters_of(row: Row) -> int:
    """Count the characters of the row's own context, or of its teacher's chat."""
    return len(row.context or "") + sum(len(message.content) for message in row.teacher_messages or ())

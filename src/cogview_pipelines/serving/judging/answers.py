"""
The answers of judges, in SQLite: each is one transaction, which is on disk before the judge is told so. A server that
is killed loses none of them.
"""

import contextlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .study import GRADES, Study

_APPLICATION = 0x436A7564  # what `PRAGMA application_id` says of our files
_SCHEMA = f"""
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE judges (token TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE answers (
    judge TEXT NOT NULL REFERENCES judges (token), caption INTEGER NOT NULL, best INTEGER NOT NULL,
    answered_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (judge, caption)
);
CREATE TABLE grades (
    judge TEXT NOT NULL, caption INTEGER NOT NULL, model INTEGER NOT NULL,
    {", ".join(f"{name} INTEGER NOT NULL" for name in GRADES)},
    PRIMARY KEY (judge, caption, model), FOREIGN KEY (judge, caption) REFERENCES answers (judge, caption)
);
PRAGMA application_id = {_APPLICATION};
"""


@dataclass(frozen=True)
class Answer:
    """
    What a judge thinks of the pictures of a caption.

    Args:
        best (`int`): The model whose picture is the best.
        grades (list of `dict`, *optional*): Of each model, by the names of [`GRADES`]; `None` in A/B mode.
    """

    best: int
    grades: Sequence[dict[str, int]] | None = None


class Answers:
    """
    The file of a study.

    Args:
        path (`Path`): The file.
        study ([`Study`], *optional*): What is judged: the file is made where there is none. Without it, a file is
            opened to be read.

    Raises:
        ValueError: If the file is none of answers, or of another study.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: Path, study: Study | None = None):
        self.path, self._lock = path, threading.Lock()
        if study is None and not path.is_file():
            raise ValueError(f"there is no file {path} of answers.")
        try:
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            with contextlib.ExitStack() as stack:
                stack.callback(self.close)
                self._begin(study)
                stack.pop_all()
        except sqlite3.OperationalError as error:
            raise OSError(f"{path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no file of answers: {error}.") from None

    def _begin(self, study: Study | None) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")  # a commit is on disk, not only in the system's memory
        self._database.execute("PRAGMA foreign_keys = ON")
        ((application,),) = self._database.execute("PRAGMA application_id")
        ((tables,),) = self._database.execute("SELECT count(*) FROM sqlite_master")
        if application != _APPLICATION and (tables or study is None):
            raise sqlite3.DatabaseError("it holds something else")
        if not tables and study is not None:
            described = {name: json.dumps(value) for name, value in _describe(study).items()}
            with self._writing():
                for statement in filter(None, map(str.strip, _SCHEMA.split(";"))):
                    self._database.execute(statement)
                self._database.executemany("INSERT INTO study VALUES (?, ?)", described.items())
        self.study = {key: json.loads(value) for key, value in self._database.execute("SELECT key, value FROM study")}
        if study is not None:
            differing = [name for name, value in _describe(study).items() if self.study.get(name) != value]
            if differing:
                raise ValueError(f"{self.path} is of another study ({', '.join(differing)}). Name another file.")

    def _writing(self) -> "_Transaction":
        return _Transaction(self._database, self._lock)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add_judges(self, count: int) -> dict[str, str]:
        """See that there are so many judges; the tokens of all, by their names."""
        with self._writing():
            there = [name for (name,) in self._database.execute("SELECT name FROM judges")]
            for number in range(len(there) + 1, count + 1):
                self._database.execute("INSERT INTO judges VALUES (?, ?)", (secrets.token_urlsafe(16), str(number)))
        return self.judges()

    def judges(self) -> dict[str, str]:
        """The tokens of all judges, by their names."""
        with self._lock:
            return dict(self._database.execute("SELECT name, token FROM judges ORDER BY rowid"))

    def put(self, token: str, caption: int, answer: Answer) -> None:
        """Keep an answer, in place of an earlier one of this judge."""
        columns = ", ".join(GRADES)
        with self._writing():
            self._database.execute("DELETE FROM grades WHERE judge = ? AND caption = ?", (token, caption))
            self._database.execute("DELETE FROM answers WHERE judge = ? AND caption = ?", (token, caption))
            self._database.execute(
                "INSERT INTO answers (judge, caption, best) VALUES (?, ?, ?)", (token, caption, answer.best)
            )
            for model, grades in enumerate(answer.grades or ()):
                values = (token, caption, model, *(grades[name] for name in GRADES))
                self._database.execute(
                    f"INSERT INTO grades (judge, caption, model, {columns}) VALUES ({', '.join('?' * len(values))})",
                    values,
                )

    def of(self, token: str) -> dict[int, Answer]:
        """The answers of a judge by caption."""
        with self._lock:
            best = list(self._database.execute("SELECT caption, best FROM answers WHERE judge = ?", (token,)))
            rows = list(
                self._database.execute(
                    f"SELECT caption, {', '.join(GRADES)} FROM grades WHERE judge = ? ORDER BY caption, model",
                    (token,),
                )
            )
        grades: dict[int, list[dict[str, int]]] = {}
        for caption, *values in rows:
            grades.setdefault(caption, []).append(dict(zip(GRADES, values, strict=True)))
        return {caption: Answer(model, grades.get(caption)) for caption, model in best}


class _Transaction:
    def __init__(self, database: sqlite3.Connection, lock: threading.Lock):
        self.database, self.lock = database, lock

    def __enter__(self) -> None:
        self.lock.acquire()
        try:
            self.database.execute("BEGIN IMMEDIATE")
        except BaseException:
            self.lock.release()
            raise

    def __exit__(self, kind, *error) -> None:
        try:
            self.database.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            self.lock.release()


def _describe(study: Study) -> dict:
    return {
        "models": list(study.names),
        "mode": "ab" if study.is_pair else "grades",
        "captions": [[row.id, row.caption] for row in study.rows],
    }

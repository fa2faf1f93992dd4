"""Rows of training data in a JSONL file; a bad one is an error with file and line."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.errors import DataError

FORMS = ({"text"}, {"messages"}, {"prompt", "completion"})
"""Fields of a row: text, a conversation for the chat template, or a prompt and the completion that alone is learnt."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        place: file and line, for errors.
        fields: exactly those of one of :data:`FORMS`.
    """

    place: str
    fields: dict[str, Any]


def read_rows(path: Path) -> tuple[list[Row], str]:
    """All rows of ``path`` and the SHA-256 of the file.

    Raises:
        DataError: the file cannot be read, has no rows, or has one that is not of a known form; names file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; it should be a JSONL file") from error
    rows = list(_rows(path, content))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows, hashlib.sha256(content).hexdigest()


def _rows(path: Path, content: bytes) -> Iterator[Row]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line and number > content.count(b"\n"):
            return  # the file ends with a line feed
        place = f"{path}:{number}"
        try:
            fields = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error})") from error
        _check(place, fields)
        yield Row(place, fields)


def _check(place: str, fields: Any) -> None:
    if not isinstance(fields, dict) or set(fields) not in FORMS:
        found = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
        forms = " or ".join("{" + ", ".join(sorted(form, reverse=True)) + "}" for form in FORMS)
        raise DataError(f"{place}: a row is {forms}, found {found or 'nothing'}")
    for name, value in fields.items():
        if name == "messages":
            _check_messages(place, value)
        elif not isinstance(value, str):
            raise DataError(f"{place}: {name} must be a string, found {type(value).__name__}")
        elif not value and name != "prompt":
            raise DataError(f"{place}: {name} is empty")


def _check_messages(place: str, messages: Any) -> None:
    whole = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not whole or not all(isinstance(message.get("role"), str) for message in messages):
        raise DataError(f"{place}: messages must be a list of {{role, content}}, with at least one")

"""Files of JSON that are replaced as one, so that no reader finds half of one."""

import json
import math
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

Row = dict[str, Any]


class RecordError(ValueError):
    """A file of records that cannot be read: says which, where, and how to fix it."""


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Opens a file that takes the place of `path` when it is complete, or not at all."""
    # The process's number keeps two processes that write the same file out of each other's way.
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror}. What was there before is untouched; fix that "
            "and run the same command again to go on from there",
        ) from error


def delete_drafts(path: Path) -> None:
    """Deletes what processes left that were killed while they wrote a file, if nobody writes it."""
    for draft in path.parent.glob(f"{path.name}.*.tmp"):
        draft.unlink()


def write_text(text: str, path: Path) -> None:
    """Writes a text."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(value: Any, path: Path) -> None:
    """Writes a value as JSON to be read by people too; what is not finite becomes null."""
    write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n", path)


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        RecordError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise RecordError(f"{path}: {error}. Restore the file, or measure it again") from error


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Writes a line of JSON a row; numbers that are not finite become null."""
    with replacing(path) as file:
        for row in rows:
            text = json.dumps(finite(row), allow_nan=False, separators=(",", ":"))
            file.write(text.encode() + b"\n")


def read_rows(path: Path) -> list[Row]:
    """Reads what `write_rows` wrote; a file that does not exist has no rows.

    Raises:
        RecordError: A line is not a JSON object.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line, parse_constant=_refuse)
            if not isinstance(row, dict):
                raise TypeError(f"not an object but {row!r}")
        except (TypeError, ValueError) as error:
            raise damaged(path, number, error) from error
        rows.append(cast(Row, row))
    return rows


def damaged(path: Path, line: int, error: Exception) -> RecordError:
    """The error of a line that cannot be read."""
    return RecordError(
        f"{path}, line {line}: {type(error).__name__}: {error}. Restore the file, or delete the "
        "line to run it again"
    )


def finite(value: Any) -> Any:
    """Replaces the numbers that JSON does not have by null, however deep in dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in cast(Row, value).items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """The number that null stands for where a number is wanted: nan."""
    return math.nan if value is None else float(value)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")

"""Contents by their hash: which files are as they were, and in which words two descriptions of a step differ."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 3
Inputs = dict[str, Any]


class Digests:
    """SHA-256 of files, each read once for as long as its size and time of change stay as they are.

    known: by path, size, time and digest, as an earlier run has found them; new ones are added to it.
    """

    def __init__(self, known: dict[str, list[Any]]) -> None:
        self.known = known

    def of(self, path: Path) -> str | None:
        """None where there is no such file."""
        try:
            found = path.stat()
            size, changed, digest = self.known.get(str(path), [None, None, None])
            if [size, changed] != [found.st_size, found.st_mtime_ns]:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self.known[str(path)] = [found.st_size, found.st_mtime_ns, digest]
        except OSError:
            return None
        return digest


def key_of(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def changes(before: Inputs, now: Inputs) -> list[str]:
    """What is another in `now`, in words. A file that is gone tells nothing, nor does a part that `before` lacks."""
    old, new = dict(_flat(before)), dict(_flat({part: now[part] for part in before if part in now}))
    return [_said(path, old, new) for path in dict.fromkeys([*old, *new]) if _differs(path, old, new)]


def _differs(path: tuple[str, ...], old: dict[Any, Any], new: dict[Any, Any]) -> bool:
    if path[0] == "files" and None in (old.get(path, 0), new.get(path, 0)):
        return False
    return path not in old or path not in new or old[path] != new[path]


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        yield path, value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _flat(item, (*path, key))


def _said(path: tuple[str, ...], old: dict[Any, Any], new: dict[Any, Any]) -> str:
    part, *rest = path
    if part in ("needs", "files"):
        another = "made something else" if part == "needs" else "changed"
        what = another if path in old and path in new else "is new" if path in new else "is no longer read"
        return f"{rest[0]} {what}"
    name = ".".join(rest if part == "stage" else path)
    was, now = (json.dumps(values[path]) if path in values else "default" for values in (old, new))
    return f"{name} changed ({was} -> {now})"


def listed(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more

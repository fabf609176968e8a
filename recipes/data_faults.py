"""What is wrong with the data of a recipe, and with what its select stage asks of it."""

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ..data_selection import Dsir
from ..data_selection.arguments import caps_of, rules_of, shares_of
from ..data_selection.duplicates import deduplicate
from ..data_selection.texts import row_text
from .links import feeder, own_sources, sources_behind
from .needs import out_of_reach
from .pictures import holds_pictures
from .rows import source_rows
from .schema import Recipe
from .schema_rows import AdaptInfSelect, Copies, Dedup, Neural, Select
from .schema_sources import Columns, HubRows, Source
from .select import dsir_settings, make_neural, spelled_caps

# Of a larger file only the first rows are looked at, lest a check takes hours; a fault further on ends the run with
# file and line.
CHECKED_BYTES, CHECKED_ROWS = 1 << 30, 100_000
CHECKED_HUB_ROWS = 20  # which come over the network

# Where in the stage, and what.
Found = Iterator[tuple[tuple[str | int, ...], str]]


@dataclass
class Seen:
    """What the sources of a key hold."""

    rows: int | None = 0  # None where it is not known
    sources: set[str] = field(default_factory=set)
    pictures: bool = False  # whether a row holds any


def source_faults(
    key: tuple[str | int, ...], sources: list[Source]
) -> Generator[tuple[tuple[str | int, ...], str], None, Seen]:
    """Reads all sources of a key, row by row."""
    name = ".".join(map(str, key))
    seen, rows, words, readable, whole = Seen(), 0, False, True, True
    for number, source in enumerate(sources):
        of_hub = isinstance(source, HubRows) and not Path(source.hub).is_dir()
        if of_hub and out_of_reach(source):
            whole, words, rows = False, True, rows + 1  # nothing can be said of it, which is a note
            continue
        most = CHECKED_HUB_ROWS if of_hub else CHECKED_ROWS if _bytes(source) > CHECKED_BYTES else None
        whole = whole and most is None
        try:
            for row in islice(source_rows(source, name, stream=of_hub), most):
                rows += 1
                words = words or bool(row_text(row, name).strip())
                seen.sources.add(str(row.get("source")))
                seen.pictures = seen.pictures or holds_pictures(row)
        except (ValueError, OSError) as error:
            readable = False
            yield (*key, number), str(error)
    if readable and not rows:
        yield key, f"{name} is empty: its sources hold no rows"
    elif readable and not words:
        yield key, f"{name} is blank: none of its {rows} rows holds a word"
    seen.rows = rows if readable and whole else None
    return seen


def _bytes(source: Source) -> int:
    path = source if isinstance(source, str) else source.path if isinstance(source, Columns) else ""
    return Path(path).stat().st_size if Path(path).is_file() else 0


def tried(path: tuple[str | int, ...], build: Callable[[], Any], keys: tuple[str, ...] = ()) -> Found:
    """What `build` complains of; where the message begins with the name of one of the `keys`, at that key."""
    try:
        build()
    except ValueError as error:
        named = re.match(r"(\w+)[=\[]", str(error))
        yield (*path, named[1]) if named and named[1] in keys else path, str(error)


def select_gaps(stage: Select) -> Found:
    """Keys of which one has to be given, and not two."""
    for one, other, what in (
        ("target", "targets", "examples of what the model should become good at"),
        ("k", "tokens", "how much to pick"),
    ):
        given = [key for key in (one, other) if getattr(stage, key) is not None]
        if not given:
            yield ("stage",), f"missing key {one!r} ({what}; or {other!r})"
        elif len(given) == 2:
            yield (other,), f"{one!r} and {other!r} both say {what}; give one of them"


def pool_seen(
    recipe: Recipe, stage: Select | AdaptInfSelect
) -> Generator[tuple[tuple[str | int, ...], str], None, Seen]:
    """What the pool of a select stage holds; of rows that a dedup stage keeps, at most, and its faults are told of that
    stage."""
    before = feeder(recipe, stage)
    if before is None:
        return (yield from source_faults(("raw",), own_sources(stage)))
    return exhausted(source_faults(("data",), sources_behind(recipe, before)))


def exhausted(finder: Generator[Any, None, Seen]) -> Seen:
    """What a generator of faults returns at its end."""
    while True:
        try:
            next(finder)
        except StopIteration as end:
            return end.value


def dedup_faults(recipe: Recipe, stage: Dedup) -> Found:
    """Data that cannot be read, and keys that do not go together."""
    if isinstance(stage.data, list):
        yield from source_faults(("data",), stage.data)
    yield from _copies_faults((), stage, stage.rules())


def select_faults(recipe: Recipe, stage: Select) -> Found:
    """Data that cannot be read, keys that do not go together, and more picks than there are rows."""
    pool = yield from pool_seen(recipe, stage)
    if stage.target is not None:
        yield from source_faults(("target",), stage.target)
    for name, sources in (stage.targets or {}).items():
        yield from source_faults(("targets", name), sources)
    if isinstance(stage.k, int) and pool.rows and stage.k > pool.rows and stage.chunk_words is None:
        holds = "the pool has" if feeder(recipe, stage) is None else "dedup looks through"
        yield ("k",), f"k is {stage.k} and {holds} {pool.rows} rows; give at most {pool.rows}"
    yield from _setting_faults(stage)
    unknown = sorted(set(spelled_caps(stage, sources_behind(recipe, stage)) or ()) - pool.sources)
    if unknown and pool.rows:
        yield ("source_caps",), f"no row of the pool has the source {unknown}; there are {sorted(pool.sources)[:20]}"
    if stage.duplicates is not None:
        rules = stage.duplicates.rules() | {"report_only": stage.duplicates.report_only}
        yield from _copies_faults(("duplicates",), stage.duplicates, rules, target=stage.duplicates.against_target)
    if stage.neural is not None:
        yield from _neural_faults(recipe, stage, stage.neural)
    if stage.engine == "ray" and find_spec("ray") is None:
        yield ("engine",), "Ray is not installed: pip install 'krontune[scale]', or leave engine out"
    if stage.push is not None:
        from huggingface_hub.utils import validate_repo_id

        yield from tried(("push",), lambda: validate_repo_id(stage.push or ""))
        if pool.pictures:
            yield ("push",), "rows of the pool hold pictures, which are not pushed; leave push out"


def _setting_faults(stage: Select) -> Found:
    keys = tuple(Select.model_fields)
    yield from tried((), lambda: Dsir(**dsir_settings(stage)), keys)
    if stage.proportions is not None:
        names = tuple(stage.targets or ("target",))
        yield from tried((), lambda: shares_of(names, stage.proportions), keys)
    yield from tried((), lambda: caps_of(stage.source_caps, 1000, stage.tokens is not None), keys)
    rules = {name: getattr(stage, name) for name in ("temperature", "min_tokens", "max_tokens", "exclude_copies")}
    rules |= {"k": 1, "tokens": None, "method": stage.sampler, "seed": 0, "source_caps": None}
    yield from tried((), lambda: rules_of(1, (1.0,), 1.0, **rules), keys)


def _copies_faults(at: tuple[str, ...], given: Copies, rules: dict[str, Any], target: bool = False) -> Found:
    for name, sources in given.against.items():
        yield from source_faults((*at, "against", name), sources)
    against = {name: ["other words"] for name in [*given.against, *(["target"] if target else [])]}
    yield from tried(at, lambda: deduplicate(["one text"], **rules, against=against), tuple(type(given).model_fields))


def _neural_faults(recipe: Recipe, stage: Select, neural: Neural) -> Found:
    from ..data_selection.neural import encoder_path

    if len(stage.targets or ()) > 1:
        yield ("neural",), f"embeddings are mixed in for one target, and there are {len(stage.targets or ())}"
    yield from tried(("neural",), lambda: make_neural(recipe, neural), tuple(Neural.model_fields))
    yield from tried(("neural", "model"), lambda: encoder_path(neural.model))
    looks_like_folder = neural.model.startswith((".", "/")) or neural.model.count("/") > 1
    if looks_like_folder and not (Path(neural.model) / "config.json").is_file():
        yield ("neural", "model"), f"model folder {neural.model!r} does not exist or holds no config.json"

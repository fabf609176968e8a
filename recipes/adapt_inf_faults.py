"""What is wrong with a select stage of method adapt_inf."""

from collections.abc import Iterator
from pathlib import Path

from .data_faults import Found, pool_seen, source_faults, tried
from .links import feeder
from .schema import Recipe, Sft
from .schema_rows import AdaptInfSelect
from .select_adapt_inf import adapt_inf


def adapt_inf_order(recipe: Recipe, number: int) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Keys of a stage that do not go together, or not with the other stages. Needs no data."""
    stage = recipe.stages[number]
    select = feeder(recipe, stage)
    if isinstance(stage, Sft) and stage.data == "select" and select is not None:
        sequence = isinstance(select, AdaptInfSelect) and select.datasets is not None
        known = ["random", *(["balanced"] if isinstance(select, AdaptInfSelect) else [])]
        known += ["sequential", "full"] if sequence else []
        for place, control in enumerate(stage.controls):
            if control not in known:
                what = "over datasets" if control in ("sequential", "full") else "of method adapt_inf"
                yield ("controls", place), f"the control {control!r} needs a select stage {what}; here: {known}"
    if not isinstance(stage, AdaptInfSelect):
        return
    if stage.raw is not None and stage.datasets is not None:
        yield ("datasets",), "raw and datasets exclude each other; leave one out"
    elif stage.datasets is None and select is None and not isinstance(stage.raw, list):
        yield ("stage",), "missing key 'raw' (or 'datasets')"
    if stage.adapter is not None and stage.adapter_from is not None:
        yield ("adapter_from",), "'adapter' is warmed up and 'adapter_from' is trained already; give one of them"
    if stage.datasets is None:
        if stage.keep is not None:
            yield ("keep",), "'keep' prunes the pool between datasets, and there is one pool; leave it out"
        return
    names = [skill.name for skill in stage.datasets]
    for place, name in enumerate(names):
        if name in names[:place]:
            yield ("datasets", place, "name"), f"two datasets are called {name!r}; rename one"
    after = recipe.stages[number + 1 :]
    if not any(isinstance(other, Sft) and feeder(recipe, other) is stage for other in after):
        yield ("datasets",), "the sft stage trains between datasets, and none with data: select comes after this stage"
    if stage.adapter is not None:
        yield ("adapter",), "over datasets the sft stage's adapter is trained; say there what it is"
    before = recipe.before(stage, "sft", "rl")
    if before is not None and stage.adapter_from is not None:
        continued = recipe.name_of(before)
        yield ("adapter_from",), f"the adapter of the {continued} stage is trained on; leave 'adapter_from' out"


def adapt_inf_faults(recipe: Recipe, stage: AdaptInfSelect) -> Found:
    """Data that cannot be read, settings that the method refuses, and more picks than there are rows."""
    from .preflight import adapter_faults

    yield from tried((), lambda: adapt_inf(stage), tuple(AdaptInfSelect.model_fields))
    if stage.shares == "spread" and "el2n" not in stage.scores:
        yield ("shares",), "shares: spread goes by the score el2n, which scores lacks"
    if stage.selector in ("nll", "ppl", "el2n", "grand") and stage.selector not in stage.scores:
        yield ("selector",), f"the selector {stage.selector!r} is not among the scores {stage.scores}; add it"
    if stage.adapter is not None:
        yield from adapter_faults(recipe, stage.adapter)
    if stage.adapter_from is not None and not (Path(stage.adapter_from) / "adapter_config.json").is_file():
        yield ("adapter_from",), f"{stage.adapter_from!r} is no folder with an adapter: it has no adapter_config.json"
    if stage.datasets is None:
        pool = yield from pool_seen(recipe, stage)
        yield from _too_many(stage, pool.rows, "the pool")
    for number, skill in enumerate(stage.datasets or []):
        rows = yield from source_faults(("datasets", number, "raw"), skill.raw)
        if skill.test is not None:
            yield from source_faults(("datasets", number, "test"), skill.test)
        elif rows.rows is not None and rows.rows <= stage.held_out:
            yield (
                ("datasets", number, "raw"),
                f"{skill.name!r} has {rows.rows} rows, and {stage.held_out} are held out for the test; lower "
                "held_out, or give test",
            )
        if number == 0 and rows.rows is not None:
            held = stage.held_out if skill.test is None else 0
            yield from _too_many(stage, rows.rows - held, "the first of the datasets")


def _too_many(stage: AdaptInfSelect, rows: int | None, what: str) -> Found:
    if isinstance(stage.k, int) and rows and stage.k > rows > 0:
        yield ("k",), f"k is {stage.k} and {what} has {rows} rows; give at most {rows}"

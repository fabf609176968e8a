"""What is wrong with a select stage of method adapt_inf."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .data_faults import Found, pool_seen, source_faults, tried
from .links import feeder, fresh_adapter, start
from .pictures import reads_pictures
from .schema import Recipe, Sft
from .schema_rows import AdaptInfSelect, WarmUp
from .select_adapt_inf import adapt_inf, adapter_section
from .targets import ConfigError, base_config, meta_model


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
    yield from _unused_adapter(recipe, stage)
    yield from _score_order(stage)
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


def _unused_adapter(recipe: Recipe, stage: AdaptInfSelect) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is said of an adapter to warm up, where one that is trained already scores."""
    before = recipe.before(stage, "sft", "rl")
    trained = f"the adapter of the {recipe.name_of(before)} stage" if before is not None else None
    if stage.adapter is not None and trained is not None and stage.datasets is None and stage.adapter_from is None:
        yield (
            ("adapter",),
            f"{trained} scores, so that this 'adapter' would not be used; leave 'adapter' out, or put this stage "
            "before that one",
        )
    if stage.warm_up != WarmUp() and (stage.adapter_from is not None or trained is not None):
        scores = repr(stage.adapter_from) if stage.adapter_from is not None else trained
        yield ("warm_up",), f"{scores} scores and is trained already, so that nothing is warmed up; leave 'warm_up' out"


def _score_order(stage: AdaptInfSelect) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Scores that cannot be had with what the stage says."""
    if "epistemic" in stage.scores and stage.members is None:
        yield (
            ("scores", stage.scores.index("epistemic")),
            "the score 'epistemic' compares members of an ensemble, and there are none; give members: a number of "
            "dropout masks, or folders with trained adapters",
        )
    if stage.members is not None and "epistemic" not in stage.scores:
        yield (
            ("members",),
            f"'members' are compared by the score 'epistemic', which is not among {stage.scores}; add it",
        )
    if isinstance(stage.members, list) and stage.datasets is not None:
        yield (
            ("members",),
            "over datasets the adapter changes with each, and adapters in 'members' do not; give a number of dropout "
            "masks",
        )


def _member_faults(recipe: Recipe, stage: AdaptInfSelect) -> Found:
    if isinstance(stage.members, list):
        for place, folder in enumerate(stage.members):
            if not (Path(folder) / "adapter_config.json").is_file():
                yield ("members", place), f"{folder!r} is no folder with an adapter: it has no adapter_config.json"
    elif stage.members is not None and not _has_dropout(recipe, stage):
        yield (
            ("members",),
            f"{stage.members} dropout masks need a dropout, and neither the adapter that scores nor the base has one; "
            "set dropout of the adapter, or give folders with trained adapters",
        )


def _has_dropout(recipe: Recipe, stage: AdaptInfSelect) -> bool:
    """Whether the adapter that scores, or the base, drops anything; true where that is not known."""
    from torch import nn

    begun: Any = start(recipe, stage)
    while begun is not None and (earlier := start(recipe, begun)) is not None:
        begun = earlier
    if stage.adapter_from is not None:
        try:
            settings = json.loads((Path(stage.adapter_from) / "adapter_config.json").read_bytes())
        except (OSError, ValueError):  # said of adapter_from
            return True
        own = settings.get("dropout") or settings.get("lora_dropout")
    else:
        fresh = adapter_section(recipe, stage) if begun is None else fresh_adapter(recipe, begun)
        own = fresh is not None and fresh.dropout
    if own:
        return True
    try:
        model = meta_model(recipe.base)
    except ConfigError:  # said of the base
        return True
    return model is None or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def adapt_inf_faults(recipe: Recipe, stage: AdaptInfSelect) -> Found:
    """Data that cannot be read, settings that the method refuses, and more picks than there are rows."""
    from .preflight import adapter_faults

    yield from tried((), lambda: adapt_inf(stage), tuple(AdaptInfSelect.model_fields))
    if stage.shares == "spread" and "el2n" not in stage.scores:
        yield ("shares",), "shares: spread goes by the score el2n, which scores lacks"
    if "log_ig" in stage.scores and not reads_pictures(recipe.base):
        yield (
            ("scores", stage.scores.index("log_ig")),
            "the score 'log_ig' compares answers with and without their images, and the base "
            f"{recipe.base.model!r} reads none; leave it out",
        )
    if stage.selector in ("nll", "ppl", "el2n", "grand", "log_ig", "epistemic") and stage.selector not in stage.scores:
        yield ("selector",), f"the selector {stage.selector!r} is not among the scores {stage.scores}; add it"
    yield from _layer_faults(recipe, stage)
    if stage.adapter is not None:
        yield from adapter_faults(recipe, stage.adapter)
    if stage.adapter_from is not None and not (Path(stage.adapter_from) / "adapter_config.json").is_file():
        yield ("adapter_from",), f"{stage.adapter_from!r} is no folder with an adapter: it has no adapter_config.json"
    yield from _member_faults(recipe, stage)
    if stage.datasets is None:
        pool = yield from pool_seen(recipe, stage)
        holds = "the pool has" if feeder(recipe, stage) is None else "dedup looks through"
        yield from _too_many(stage, pool.rows, holds)
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
            yield from _too_many(stage, rows.rows - held, "the first of the datasets has")


def _layer_faults(recipe: Recipe, stage: AdaptInfSelect) -> Found:
    """Decoder layers that the base does not have."""
    if not isinstance(stage.gradients, list):
        return
    if not stage.gradients:
        yield ("gradients",), "gradients is an empty list; give last, all or numbers of decoder layers"
    try:
        config = base_config(recipe.base)
    except ConfigError:  # said of the base
        return
    depth = None if config is None else getattr(config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        return
    for place, layer in enumerate(stage.gradients):
        if not 0 <= layer < depth:
            yield ("gradients", place), f"the base has the decoder layers 0 to {depth - 1}, and {layer} is none of them"


def _too_many(stage: AdaptInfSelect, rows: int | None, holds: str) -> Found:
    if isinstance(stage.k, int) and rows and stage.k > rows > 0:
        yield ("k",), f"k is {stage.k} and {holds} {rows} rows; give at most {rows}"

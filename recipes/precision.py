"""The bit plan of a run: made once, kept in the run folder, and copied beside every adapter."""

from dataclasses import replace
from pathlib import Path

from ..adapters import BitPlan, bit_plan
from ..adapters.mixed import whole_rows
from ..adapters.precision import PLAN
from .rows import source_rows
from .schema_model import BaseModelSection
from .schema_sources import Shipped


def recipe_plan(base: BaseModelSection, run: Path) -> BitPlan | None:
    """The plan in this run folder, made now where there is none for this base; None where the recipe has no precision.

    Raises:
        BaseModelError: the plan is damaged, or the model cannot be loaded or has no layers to give bits to.
    """
    asked = base.precision
    if asked is None:
        return None
    tokens = None if asked.scorer == "zd" else whole_rows(asked.tokens)
    if (run / PLAN).is_file():
        kept = BitPlan.load(run / PLAN)
        same = (kept.model, kept.revision, kept.scorer, kept.levels, kept.avg_bits, (kept.sample or {}).get("tokens"))
        if same == (base.model, base.revision, asked.scorer, tuple(asked.levels), asked.avg_bits, tokens):
            return kept
    prose = (row["text"] for row in source_rows(Shipped(shipped="prose"), "prose"))
    plan = bit_plan(
        base.model,
        asked.scorer,
        levels=asked.levels,
        avg_bits=asked.avg_bits,
        texts=prose,
        tokens=asked.tokens,
        attn_implementation=base.attn_implementation,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
    )
    plan.save(run / PLAN)
    return plan


def save_plan(base: BaseModelSection, run: Path, adapter: Path) -> None:
    """Put the run's plan, if it has one, beside an adapter, so that who loads it finds the base that it stands on.

    The adapter may be published, so of a model's folder only the name is kept.
    """
    if base.precision is None:
        return
    plan = BitPlan.load(run / PLAN)
    is_path = Path(plan.model).expanduser().exists() or plan.model.startswith((".", "/", "~"))
    replace(plan, model=Path(plan.model).name if is_path else plan.model).save(adapter)

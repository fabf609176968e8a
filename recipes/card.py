"""The model card: README.md beside the adapter. It says what this run did and nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.embedded import HUB_ID, to_hub_id
from .figures import ASKS, COLUMNS, cells, check_name, heuristic_name, model_name, number, storage
from .masking import without_paths
from .run_folder import yaml_text
from .run_report import RunFiles

CARD = "README.md"


def model_card(run: RunFiles, adapter: Path, repo: str | None = None) -> str:
    """The card of the adapter in this folder, for PEFT's library page on the Hub.

    Paths of this machine are cut to the file's name. The licence is the base model's where that is known, else it is
    left out.

    repo: where the adapter will stand, to be named in the lines that load it; None takes the recipe's.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = hub_base(run.recipe, config)
    sees = (adapter / "processor_config.json").is_file()
    parts = [
        f"---\n{yaml_text(metadata(run.recipe, config['peft_type'], base, sees))}---",
        f"# {run.record['name']}",
        *([run.recipe["description"]] if run.recipe.get("description") else []),
        _what(run, config, base),
        _how(run, base, repo or (run.recipe.get("hub") or {}).get("repo"), sees),
        *([_how_mixed()] if run.recipe["base"].get("precision") else []),
        *_results(run),
        *_checks(run),
        "## Recipe\n\n```yaml\n" + yaml_text(without_paths(run.recipe)) + "```",
        _made(run),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def metadata(recipe: dict[str, Any], peft_type: str, base: str | None, sees: bool = False) -> dict[str, Any]:
    """What the Hub reads of the card.

    recipe: as a dict. base: its Hub id; None where it has none. sees: whether it reads pictures.
    """
    from huggingface_hub import ModelCardData

    tags = ["krontune", peft_type.lower()]
    if recipe["base"]["quantization"]:
        tags.append("4-bit" if recipe["base"]["quantization"] != "int8" else "8-bit")
    if recipe["base"].get("precision"):
        tags.append("mixed-precision")
    kinds = [stage["stage"] for stage in recipe["stages"]]
    tags += [name for kind, name in (("sft", "sft"), ("rl", "grpo"), ("verify", "rlvr")) if kind in kinds]
    known = {"base_model": base, "base_model_relation": "adapter", **licence(base)} if base else {}
    data = {
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": tags,
        "datasets": list(_datasets(recipe)) or None,
    }
    front = ModelCardData(library_name="peft", **known, **data).to_dict()  # pyright: ignore[reportArgumentType]
    return {key: front[key] for key in ("library_name", *known, *data) if front.get(key) is not None}


def hub_base(recipe: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The Hub id of the base model: what the recipe says it is, or the one that the adapter was trained on; None for a
    folder of this machine."""
    given = (recipe.get("hub") or {}).get("base_model")
    return given or _hub_id(to_hub_id(config.get("base_model_name_or_path")))


def licence(base: str) -> dict[str, str]:
    """license, license_name and license_link of the card of the base, where that is on this machine; what it does not
    say is not guessed."""
    if base == HUB_ID:
        return {"license": "apache-2.0"}
    from huggingface_hub import ModelCard, try_to_load_from_cache

    file = try_to_load_from_cache(base, CARD)
    if not isinstance(file, str):
        return {}
    try:
        said = ModelCard.load(file, ignore_metadata_errors=True).data
    except ValueError:  # a card without readable metadata
        return {}
    found = {
        key: value for key in ("license", "license_name", "license_link") if isinstance(value := said.get(key), str)
    }
    if "license" not in found or found["license"] == "unknown":
        return {}
    if "license_link" in found and "://" not in found["license_link"]:
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{found['license_link'].removeprefix('./')}"
    return found


def _datasets(recipe: dict[str, Any]) -> Iterator[str]:
    """Of the data that has an id of the Hub: what was trained on, and what the picks were pushed as."""
    named = [(recipe.get("hub") or {}).get("dataset")]
    for stage in recipe["stages"]:
        named.append(stage.get("push"))
        sources = [one for key in ("data", "raw") if isinstance(stage.get(key), list) for one in stage[key]]
        sources += [one for skill in stage.get("datasets") or [] for one in skill["raw"]]
        named += [source["hub"] for source in sources if isinstance(source, dict) and "hub" in source]
    yield from dict.fromkeys(name for name in named if name and _hub_id(name))


def _hub_id(name: str | None) -> str | None:
    """The name where it is a Hub id, and not a path of this machine."""
    is_id = name and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)
    return name if is_id and not Path(str(name)).exists() else None


def _what(run: RunFiles, config: dict[str, Any], base: str | None) -> str:
    trained = [stage for stage in run.stages.values() if "trainable_parameters" in stage]
    quantised = storage(run.recipe["base"])
    size = f", {trained[-1]['trainable_parameters']:,} trained parameters" if trained else ""
    return (
        f"A {config['peft_type']} adapter over {base or 'a checkpoint that is not on the Hub'}"
        f"{f' in {quantised}' if quantised else ''}{size}, made with "
        f"[krontune](https://pypi.org/project/krontune/) {run.record['versions']['krontune']}."
    )


def _how(run: RunFiles, base: str | None, repo: str | None, sees: bool) -> str:
    adapter = (
        f'adapter = "{repo}"' if repo else 'adapter = "..."  # the id of this repository, or the folder of this file'
    )
    if sees:
        return f"""\
## How to load

```python
import krontune.adapters  # teaches PEFT this kind of adapter: pip install krontune
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

{adapter}
model = AutoModelForImageTextToText.from_pretrained("{base or "..."}")
model = PeftModel.from_pretrained(model, adapter)
processor = AutoProcessor.from_pretrained(adapter)
```"""
    text = f"""\
## How to load

```python
import krontune.adapters  # teaches PEFT this kind of adapter: pip install krontune
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

{adapter}
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```"""
    quantised = run.recipe["base"]["quantization"]
    if not quantised or not base:
        return text
    return f"""{text}

It was trained over the base in {quantised}, and the lines above load the base as it is on the Hub. In {quantised}:

```python
from krontune.adapters import load_base
from peft import PeftModel

model, tokenizer = load_base("{base}", "{quantised}")
model = PeftModel.from_pretrained(model, adapter)
```"""


def _how_mixed() -> str:
    return """\
The base that it was trained over has layers of different precision, by `bit_plan.json` beside the adapter:

```python
from krontune.adapters import load_base
from peft import PeftModel

base, tokenizer = load_base("...", precision="the folder of bit_plan.json")  # the base model
model = PeftModel.from_pretrained(base, adapter)
```"""


def _results(run: RunFiles) -> list[str]:
    result = run.verify
    if result is None:
        return ["## Results\n\nThis run did not verify its models."]
    task = result["task"]
    rows = [[model_name(name), *cells(one)] for name, one in result["models"].items()]
    rows += [[heuristic_name(name), *cells(one)] for name, one in result["heuristics"].items()]
    about = (
        f"{result['instances']} held-out instances of {task['name']}, {task['n'][0]} to {task['n'][1]} rows, greedy "
        f"answers, one training run with seed {run.record['seed']}; in brackets 95 % intervals over instances. "
        "Certificate: the chosen rows are feasible and optimal. Gap: right answers that no certificate backs. "
        "Solution: how probably sampling writes the worked one."
    )
    head = ["", *COLUMNS.values()]
    return [f"## Results\n\n{about}\n\n{_table(head, rows)}"]


def _checks(run: RunFiles) -> list[str]:
    checks = run.report["checks"]
    if not checks:
        return []
    rows = [
        [check_name(one), one["verdict"], number(one["value"], one["ci"]), number(one["threshold"]), str(one["n"])]
        for one in checks
    ]
    asked = "\n".join(f"- {name.replace('_', ' ')}: {ASKS[name]}" for name in _names(checks))
    head = ["check", "verdict", "value", "threshold", "N"]
    return [f"## Checks\n\nEach stands for itself; there is no blended score.\n\n{_table(head, rows)}\n\n{asked}"]


def _names(checks: list[dict[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(one["name"] for one in checks) if name in ASKS]


def _made(run: RunFiles) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.record["versions"].items())
    return f"## Made with\n\n{versions}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)

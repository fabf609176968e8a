"""The model card: README.md beside the adapter. It says what this run did and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .figures import ASKS, COLUMNS, cells, check_name, heuristic_name, model_name, number, storage
from .run_report import RunFiles

CARD = "README.md"
MASK = "(not shown)"
WORDS = ("instruction", "description", "text")  # keys of a recipe that hold words, never a path
_SECRET = re.compile(r"^[^/\\]*(key|token|secret|password)[^/\\]*$", re.IGNORECASE)  # of a name, not of a path


def model_card(run: RunFiles, adapter: Path) -> str:
    """The card of the adapter in this folder, for PEFT's library page on the Hub.

    Paths of this machine are cut to the file's name. The licence is left to the one who publishes: it has to agree
    with the base model's and the data's.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    parts = [
        "---\n" + yaml.safe_dump(_front(run, config), sort_keys=False, allow_unicode=True) + "---",
        f"# {run.record['name']}",
        *([run.recipe["description"]] if run.recipe.get("description") else []),
        _what(run, config),
        _how(),
        *([_how_mixed()] if run.recipe["base"].get("precision") else []),
        *_results(run),
        *_checks(run),
        "## Recipe\n\n```yaml\n"
        + yaml.safe_dump(masked(_published(run.recipe)), sort_keys=False, allow_unicode=True)
        + "```",
        _made(run),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front(run: RunFiles, config: dict[str, Any]) -> dict[str, Any]:
    """The metadata that the Hub reads."""
    tags = ["krontune", config["peft_type"].lower()]
    if run.recipe["base"]["quantization"]:
        tags.append("4-bit" if run.recipe["base"]["quantization"] != "int8" else "8-bit")
    if run.recipe["base"].get("precision"):
        tags.append("mixed-precision")
    kinds = [stage["stage"] for stage in run.recipe["stages"]]
    tags += [name for kind, name in (("sft", "sft"), ("rl", "grpo"), ("verify", "rlvr")) if kind in kinds]
    front: dict[str, Any] = {"library_name": "peft"}
    base = _hub_id(config["base_model_name_or_path"])
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    return {**front, "pipeline_tag": "text-generation", "tags": tags}


def _hub_id(name: str | None) -> str | None:
    """The name where it is a Hub id, and not a path of this machine."""
    is_id = name and name.count("/") <= 1 and not name.startswith((".", "/", "~", "\\")) and ":" not in name
    return name if is_id and not Path(str(name)).exists() else None


def _what(run: RunFiles, config: dict[str, Any]) -> str:
    base = _hub_id(config["base_model_name_or_path"]) or "a checkpoint that is not on the Hub"
    trained = [stage for stage in run.stages.values() if "trainable_parameters" in stage]
    quantised = storage(run.recipe["base"])
    size = f", {trained[-1]['trainable_parameters']:,} trained parameters" if trained else ""
    return (
        f"A {config['peft_type']} adapter over {base}{f' in {quantised}' if quantised else ''}{size}, made with "
        f"[krontune](https://pypi.org/project/krontune/) {run.record['versions']['krontune']}."
    )


def _how() -> str:
    return """\
## How to load

```python
import krontune.adapters  # teaches PEFT this kind of adapter: pip install krontune
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = "..."  # the id of this repository, or the folder of this file
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
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


def masked(value: Any, key: str = "") -> Any:
    """A recipe without the values of keys that are named like a secret, and what stands in them. A number under a name
    with "token" counts tokens and is none."""
    if isinstance(value, dict):
        return {name: masked(item, key if _SECRET.search(key) else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, key) for item in value]
    if value is None or isinstance(value, bool) or not _SECRET.search(key):
        return value
    return value if isinstance(value, int | float) and "token" in key.lower() else MASK


def _published(value: Any, key: str = "") -> Any:
    """The recipe without paths of this machine. What a key of `WORDS` holds is text, whatever it begins with."""
    if isinstance(value, dict):
        return _with_names({name: _published(item, str(name)) for name, item in value.items()})
    if isinstance(value, list):
        return [_published(item, key) for item in value]
    return _name(value) if isinstance(value, str) and key not in WORDS else value


def _with_names(values: dict[Any, Any]) -> dict[Any, Any]:
    """With the keys that are paths cut too; of two files of one name the second is called "name (2)"."""
    found: dict[Any, Any] = {}
    for key, value in values.items():
        name = short = _name(key) if isinstance(key, str) else key
        number = 2
        while name in found:
            name, number = f"{short} ({number})", number + 1
        found[name] = value
    return found


def _name(text: str) -> str:
    """Of a path of this machine the file's name; other text as it is, "/no_think" too: a path from the root has
    folders in it."""
    plain = text.replace("\\", "/").rstrip("/")
    relative = text.startswith(("~", "./", "../", ".\\", "..\\"))
    rooted = text.startswith("/") and plain.count("/") > 1
    drive = len(text) > 2 and text[1:3] in (":\\", ":/")
    return plain.rpartition("/")[2] if relative or rooted or drive else text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)

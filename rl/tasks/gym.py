"""reasoning-gym, both ways: our tasks among its data sets, and its data sets for our trainers.

Some of its scorers execute Python taken from the answer, and others raise or pay for anything (measured with 0.1.25).
So they run in killable child processes alone, and those that execute answers never.
"""

import json
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RlError
from ..evaluation import completion_text
from ..guard import Guarded
from . import TASKS, get_task
from .base import CertificateTask
from .options import unknown
from .splits import stream

if TYPE_CHECKING:
    from datasets import Dataset

# They pass the answer to eval or to sympy's parse_expr; "composite" hands it to any of the others.
EXECUTE = (
    "binary_matrix",
    "composite",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
# They pay the full reward for any text that is not empty.
PAY_ANYTHING = ("game_of_life_halting",)


def register() -> list[str]:
    """Adds our tasks to reasoning-gym as `krontune_<task>` data sets, and returns those names; idempotent.

    Their configuration has seed, size, min_n and max_n, and `options`, a mapping for the task. They are scored
    by the task's own check (1.0 for an optimal certificate), which executes nothing. Raises RlError without
    the package.
    """
    factory = _gym("factory")
    names = []
    for name, kind in TASKS.items():
        names.append(f"krontune_{name}")
        if names[-1] not in factory.DATASETS:
            factory.register_dataset(names[-1], *_dataset_class(kind))
    return names


def _dataset_class(kind: type[CertificateTask]) -> tuple[type, type]:
    base = _gym("dataset").ProceduralDataset
    fields = [("seed", int, 0), ("size", int, 500), ("min_n", int, 3), ("max_n", int, 5), ("options", Any, None)]
    config_class = make_dataclass(f"{kind.__name__}Config", fields)

    class TaskDataset(base):
        def __init__(self, config: Any):
            super().__init__(config, config.seed, config.size)
            self.task = get_task(kind.name, **(config.options or {}))

        def __getitem__(self, idx: int) -> dict[str, Any]:
            task = self.task
            # not Random(seed + idx), with which neighbouring seeds share all items but one
            item = task.generate(stream(task.name, self.config.seed, idx), (self.config.min_n, self.config.max_n))
            return {
                "question": task.prompt(item),
                "answer": task.completion(item),
                "metadata": {
                    "source_dataset": f"krontune_{task.name}",
                    "source_index": idx,
                    "instance": task.to_json(item),
                    "difficulty": {"n": item.n},
                },
            }

        def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
            item = self.task.instance_from_json(entry["metadata"]["instance"])
            return float(self.task.mark(item, answer or "").certificate_right)

    return TaskDataset, config_class


def gym_dataset(name: str, size: int, seed: int = 0, **config: Any) -> "Dataset":
    """A data set of reasoning-gym for TRL: `prompt` (one user message), `answer`, `entry` (JSON, for the reward).

    Each item is drawn with a seed of its own, derived from name, seed and index: reasoning-gym itself uses
    seed + index, so that its data sets of seeds 0 and 1 share all items but one. Raises RlError without the
    package and for a name that is unknown or refused.
    """
    from datasets import Dataset

    create = _gym("factory").create_dataset
    _allowed(name)
    rows = []
    for index in range(size):
        item = create(name, seed=stream(name, seed, index).randrange(2**31), size=1, **config)[0]
        rows.append(
            {
                "prompt": [{"role": "user", "content": item["question"]}],
                "answer": str(item["answer"]),
                "entry": json.dumps(item, default=str),
            }
        )
    return Dataset.from_list(rows)


def gym_reward(name: str, **limits: Any) -> Guarded:
    """A reward function that scores with reasoning-gym's own scorer, in killable child processes.

    The answer is what stands in the last `<answer>...</answer>`, or the whole text after the last `</think>`.
    limits: the options of `Guarded`. Columns: `entry`, from `gym_dataset`. Entries travel as JSON, so scorers
    that need Python objects in them fail, which counts as no score. Raises RlError without the package and
    for a name that is unknown or refused.
    """
    _gym("factory")
    _allowed(name)
    return Guarded(GymScorer(name), **limits)


class GymScorer:
    """What `gym_reward` runs in its child processes; calling it anywhere else gives up that protection."""

    def __init__(self, name: str):
        self.name = name
        self.__name__ = f"gym_{name}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loaded with reasoning-gym, which takes seconds: a guard's worker then does so outside any time limit."""
        self.__dict__.update(state)
        _gym("factory")

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        entry: Sequence[str] = (),
        **columns: Any,
    ) -> list[float]:
        """One score per completion."""
        _allowed(self.name)
        score = _gym("factory").get_score_answer_fn(self.name)
        texts = [completion_text(completion) for completion in completions or ()]
        return [float(score(_answer(text), json.loads(item))) for text, item in zip(texts, entry, strict=True)]


def _answer(text: str) -> str:
    text = text.rpartition("</think>")[2]
    inside = text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text
    return inside.strip()


def _allowed(name: str) -> None:
    if name in EXECUTE:
        raise RlError(f"reasoning-gym's scorer of {name!r} executes the answer as Python: refused")
    if name in PAY_ANYTHING:
        raise RlError(f"reasoning-gym's scorer of {name!r} pays for any text: refused")
    if name.startswith("krontune_"):
        raise RlError(f"{name!r} is a task of this library: use its dataset() and CertificateReward")
    known = _gym("factory").DATASETS
    if name not in known:
        raise unknown("data set", name, known)


def _gym(module: str) -> Any:
    from importlib import import_module

    try:
        import_module("reasoning_gym")  # registers its data sets
        return import_module(f"reasoning_gym.{module}")
    except ImportError as error:
        raise RlError("this needs reasoning-gym: pip install reasoning-gym") from error

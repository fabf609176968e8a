"""The models of a run under test: the base and its adapters, and what each of them answered."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data_selection.selection import write_atomic
from ..rl.generation import generate
from ..rl.likelihood import answer_probabilities
from .progress import Progress
from .schema import Recipe, Verify
from .training import ADAPTER

WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
SPARE = 8  # tokens beyond the longest worked solution


class Model:
    """One model of the run. It is loaded when it is first asked something new.

    Each question is put once: its answers are kept in a file named after the weights, the questions and the
    settings, so a stage that was cut reads what it had.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        stage: Verify,
        adapter: Path | None,
        answers: Sequence[Path],
        base: Callable[[], Any],
    ) -> None:
        """adapter: None for the base alone. answers: folders to look for the files in; they are written to the first.
        base: gives the base and its tokenizer, the same objects on each call."""
        self.name, self.stage, self.adapter, self.answers, self.base = name, stage, adapter, answers, base
        self.dense = recipe.base.dense_generation
        self.weights = hashlib.sha256(json.dumps(recipe.base.model_dump(), sort_keys=True).encode())
        for file in WEIGHTS if adapter else ():
            self.weights.update((Path(str(adapter)) / file).read_bytes())

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        base, tokenizer = self.base()
        return (PeftModel.from_pretrained(base, str(self.adapter)) if self.adapter else base), tokenizer

    def ask(
        self,
        label: str,
        prompts: Sequence[Any],
        *,
        room: Sequence[str] = (),
        temperature: float = 0.0,
        starts: Sequence[str] | None = None,
        chat: bool = True,
    ) -> list[str]:
        """Answers, by `krontune.rl.generation.generate`.

        label: for the progress line and the file. room: texts as long as an answer may have to be, where that is more
        than the stage's max_new_tokens.
        """
        settings = {
            "max_new_tokens": self.stage.max_new_tokens,
            "dense": self.dense,
            "temperature": temperature,
            "starts": starts,
            "chat": chat,
        }

        def say() -> list[str]:
            model, tokenizer = self.loaded
            if room:
                settings["max_new_tokens"] = max(self.stage.max_new_tokens, longest_in_tokens(tokenizer, room) + SPARE)
            progress = Progress(f"verify {self.name}, {label}", len(prompts), "answer")
            said = generate(
                model,
                tokenizer,
                prompts,
                batch_size=self.stage.batch_size,
                on_batch=progress.update,
                seed=self.stage.seed,
                **settings,
            )
            progress.close()
            return said

        return self._once(label, [list(prompts), list(room), settings], say)

    def probabilities(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """How probable each answer is, by `krontune.rl.likelihood.answer_probabilities`."""

        def weigh() -> list[float]:
            model, tokenizer = self.loaded
            progress = Progress(f"verify {self.name}, solutions", len(prompts), "solution")
            found = answer_probabilities(
                model,
                tokenizer,
                prompts,
                answers,
                batch_size=self.stage.batch_size,
                dense=self.dense,
                on_batch=progress.update,
            )
            progress.close()
            return found

        return self._once("solutions", [list(prompts), list(answers), {"dense": self.dense}], weigh)

    def _once(self, label: str, question: Any, way: Callable[[], Any]) -> Any:
        digest = self.weights.copy()
        digest.update(json.dumps(question).encode())
        name = f"{self.name}-{label.replace(' ', '-')}-{digest.hexdigest()[:16]}.json"
        for folder in self.answers:
            if (folder / name).is_file():
                return json.loads((folder / name).read_text(encoding="utf-8"))
        found = way()
        self.answers[0].mkdir(exist_ok=True)
        write_atomic(self.answers[0] / name, json.dumps(found).encode())
        return found

    def close(self) -> None:
        """Give the base its own layers back."""
        if "loaded" in vars(self):
            model, _ = self.loaded
            if isinstance(model, PeftModel):
                model.unload()
            del self.loaded

    @classmethod
    def of_stage(
        cls, name: str, recipe: Recipe, stage: Verify, run: Path, answers: Sequence[Path], base: Callable[[], Any]
    ) -> "Model":
        """The base, or what the training stage of this name saved."""
        return cls(name, recipe, stage, None if name == "base" else run / name / ADAPTER, answers, base)


def longest_in_tokens(tokenizer: Any, texts: Sequence[str]) -> int:
    return max(len(tokenizer(text)["input_ids"]) for text in texts)

"""What a run folder holds already, and what of it still stands for a recipe."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from .content import Digests, Inputs, changes, key_of
from .faults import RecipeError
from .inputs import inputs_of, settings_of
from .loader import load
from .run_folder import METRICS, RunFolder, WrongFolder
from .steps import Step, steps

Say = Callable[[str], None]


class History:
    """The finished steps of a run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.digests = Digests(dict(folder.record.get("files", {})))

    def inputs(self, step: Step) -> Inputs:
        return inputs_of(self.folder.recipe, step, self.folder.path, self.digests)

    def changes(self, step: Step) -> list[str] | None:
        """None where the step is done and still stands. Else what has changed since, in words; of a step that is not
        done, nothing."""
        if not self.folder.is_done(step.name):
            return []
        made = self._made_from(step.name)
        if "needs" not in made:  # by a version that did not write it down, nor for the steps before
            late = [name for name in step.needs if not self._is_early(name)]
            if late:
                return [f"{name} made something else" for name in late]
        return changes(made, self.inputs(step)) or None

    def _made_from(self, name: str) -> Inputs:
        return self.folder.mark(name).get("inputs") or self._early.get(name, {})

    def _is_early(self, name: str) -> bool:
        return self.folder.is_done(name) and "needs" not in self._made_from(name)

    @cached_property
    def _early(self) -> dict[str, Inputs]:
        """Of steps that were done by a version that did not write down what they were made from: the recipe's part."""
        file = self.folder.path / "recipe.yaml"
        try:
            before = load(file)
        except RecipeError as error:
            raise WrongFolder(
                f"{file} cannot be read ({error}). Nothing was changed; give another folder with --out"
            ) from error
        return {step.name: settings_of(before, step) for step in steps(before)}

    def settle(self) -> None:
        """Write down what early steps were made from, before the recipe that says it is replaced by this one."""
        self.folder.record["files"] = self.digests.known
        for name in list(self.folder.record["stages"]):
            if self.folder.is_done(name) and "inputs" not in self.folder.mark(name):
                self.folder.date(name, self._early.get(name, {}))
        self.folder.write_recipe()

    def leave_out(self, todo: Sequence[Step], say: Say) -> bool:
        """Move aside what is done and no longer in the recipe."""
        gone = [name for name in self.folder.record["stages"] if name not in {step.name for step in todo}]
        for name in gone:
            aside = self.folder.set_aside(name)
            say(f"{name}: no longer in the recipe, kept in {aside.name if aside else name}")
        return bool(gone)

    def expect(self, step: Step, say: Say) -> None:
        """Say what the step is made from."""
        moved = self.folder.expect(step.name, self.inputs(step))
        if moved is not None:
            say(f"{step.name}: was cut while it was made from something else; its checkpoints are kept in {moved.name}")

    def take(self, step: Step, share: Sequence[Path], say: Say) -> bool:
        """Whether the step was done from these very inputs already, before something was changed or in one of the runs
        in `share`; then it stands again."""
        key = key_of(self.inputs(step))
        own = self.folder.old(step.name, key)
        for source in (own, *(other / step.name for other in share)):
            if not (source / "done").is_file() or json.loads((source / "done").read_text()).get("key") != key:
                continue
            metrics = (source if source == own else source.parent) / METRICS
            self.folder.take(step.name, source, metrics)
            say(f"{step.name}: made from the same before, taken from {source}")
            return True
        return False

"""The checks of the verify stage: which there are, and how each puts its questions to the model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..data_selection import DataSelectionError
from ..rl import CertificateReward, CertificateTask, checks
from ..rl.checks import CheckResult
from ..rl.checks.reading import states_rows, unordered
from ..rl.checks.result import not_run
from ..rl.checks.rows import held_out_overlap
from ..rl.tasks import Instance
from ..rl.tasks.base import Mark
from .audit import training_texts, tried
from .links import rl_of
from .models import Model
from .names import is_control, parts
from .rewards import Reward, guard_of, make_reward
from .schema import Recipe, Verify
from .trainer_args import given

Found = dict[str, list[CheckResult]]
Ways = dict[str, Callable[[], CheckResult]]

OF_THE_TASK = ("soundness", "verifier", "heuristics", "shortcut_ceiling")
OF_ANSWERS = ("triplet", "attribution", "heuristic_agreement", "feature_probe", "process_claims")
OF_MODELS = ("base_vs_tuned", "spurious_controls")
ASKED = ("symmetry", "size_ladder", "discriminating", "early_answering", "self_explanation", "contamination")
ALL = (*OF_THE_TASK, "headroom", "contamination", *OF_ANSWERS, *OF_MODELS, *ASKED[:-1])

GROUP = 8  # TRL's own num_generations
EXPLAIN = "Which rows does your answer depend on? Reply with their ids only: \\ids{id,id}"
_IDS = re.compile(r"\\ids\{([0-9, ]{0,2000})\}")


@dataclass
class Answers:
    """What the models of a run answered: `greedy` one text an instance, `samples` several; `last` is the model that
    the checks are about."""

    task: CertificateTask
    n: list[int]
    instances: list[Instance]
    last: str
    greedy: dict[str, list[str]] = field(default_factory=dict)
    samples: dict[str, list[list[str]]] = field(default_factory=dict)

    def right(self, name: str) -> list[list[int]]:
        """(instances, samples) of 0 and 1: right certificates among the samples, or else of the greedy answers."""
        drawn = self.samples.get(name) or [[text] for text in self.greedy[name]]
        return [
            [int(self.task.mark(one, text).certificate_right) for text in texts]
            for one, texts in zip(self.instances, drawn, strict=True)
        ]


def wanted(stage: Verify, names: Sequence[str]) -> list[str]:
    """Those of the checks `names` that the recipe asks for."""
    return [name for name in names if name in stage.checks or "all" in stage.checks]


def while_loaded(recipe: Recipe, stage: Verify, run: Path, said: Answers, model: Model) -> Found:
    """The checks that put new questions to the model."""
    task, few = said.task, said.instances[: stage.probes]
    answers = said.greedy[model.name][: stage.probes]

    def policy(label: str, room: bool = False) -> Callable[[Sequence[Instance]], list[str]]:
        return lambda asked: model.ask(
            label, [task.prompt(one) for one in asked], room=[task.completion(one) for one in asked] if room else ()
        )

    def go_on(asked: Sequence[Instance], heads: Sequence[str]) -> list[str]:
        room = [task.completion(one) for one in asked]
        return model.ask("early answering", [task.prompt(one) for one in asked], starts=list(heads), room=room)

    def explain(asked: Sequence[Instance], texts: Sequence[str]) -> list[tuple[int, ...] | None]:
        chats = [_asked_why(task.prompt(one), text) for one, text in zip(asked, texts, strict=True)]
        return [_ids(text) for text in model.ask("self-explanation", chats)]

    ways: Ways = {
        "symmetry": lambda: checks.symmetry(task, few, policy("symmetry", room=True)),
        "size_ladder": lambda: checks.size_ladder(
            task, policy("size ladder", room=True), stage.sizes, stage.probes, seed=stage.seed
        ),
        "discriminating": lambda: checks.discriminating(
            task, policy("discriminating"), said.n, stage.probes, seed=stage.seed
        ),
        "early_answering": lambda: checks.early_answering(task, few, answers, checks.forced_answers(task, go_on)),
        "self_explanation": lambda: checks.self_explanation(task, few, policy("explained"), explain),
        "contamination": lambda: _completed(stage, said, model),
    }
    found = {name: [tried(name, ways[name])] for name in wanted(stage, ASKED)}
    if "contamination" in found:
        found["contamination"].insert(0, tried("contamination", lambda: _overlap(recipe, stage, run, said)))
    return found


def after_answers(recipe: Recipe, stage: Verify, said: Answers) -> Found:
    """The checks of the task, of the last model's answers, and of the models against each other.

    `headroom` is made, asked for or not, wherever samples were drawn.
    """
    task, n = said.task, said.n
    made = cache(lambda: _reward(recipe, stage, task))

    def of_reward(check: Callable[[Reward], CheckResult]) -> CheckResult:
        reward, name = made()
        result = check(reward)
        return replace(result, details={"reward": name, **result.details})

    ways: Ways = {
        "soundness": lambda: checks.soundness(task, n),
        "verifier": lambda: of_reward(lambda reward: checks.verifier(reward, task, n)),
        "heuristics": lambda: of_reward(lambda reward: checks.heuristics(task, reward, n)),
        "shortcut_ceiling": lambda: checks.shortcut_ceiling(task, n),
        "spurious_controls": lambda: _spurious_controls(said),
    }
    answers = said.greedy[said.last]
    ways |= {name: lambda name=name: getattr(checks, name)(task, said.instances, answers) for name in OF_ANSWERS}
    try:
        found = {name: [tried(name, ways[name])] for name in wanted(stage, tuple(ways))}
    finally:
        guard = guard_of(made()[0]) if made.cache_info().currsize else None
        if guard is not None:
            guard.close()
    if wanted(stage, ["base_vs_tuned"]):
        found["base_vs_tuned"] = _base_vs_tuned(said)
    if stage.checks and stage.samples or wanted(stage, ["headroom"]):
        found["headroom"] = [tried("headroom", lambda: _headroom(recipe, stage, said))]
    return found


def _reward(recipe: Recipe, stage: Verify, task: CertificateTask) -> tuple[Reward, str]:
    """The rl stage's reward where that stage has this task, else the certificate reward; and its name."""
    rl = rl_of(recipe, stage)
    if rl is not None and rl.task is not None:
        settings = stage.task or rl.task
        if (settings.name, settings.options) == (rl.task.name, rl.task.options):
            return make_reward(rl, task, recipe.seed), rl.reward
    return CertificateReward(task), "certificate (the rl stage has another task)"


def _headroom(recipe: Recipe, stage: Verify, said: Answers) -> CheckResult:
    """Of the model that the rl stage began with, with that stage's group size."""
    rl = rl_of(recipe, stage)
    trained = _models(said)
    name = None if rl is None else recipe.name_of(rl)
    begins = trained[: trained.index(name)] if name in trained else trained
    if rl is None or not said.samples:
        return not_run("headroom", "there is no rl stage" if rl is None else "no samples were drawn; set samples")
    result = checks.headroom(said.right(begins[-1]), given(rl.trainer).get("num_generations") or GROUP)
    return replace(result, details={"model": begins[-1], **result.details})


def curves(said: Answers) -> dict[str, Any]:
    """pass@k and con@k of each model that was sampled: by certificate and by stated answer."""
    table = {}
    for name, drawn in said.samples.items():
        marks = [[said.task.mark(one, text) for text in own] for one, own in zip(said.instances, drawn, strict=True)]
        values = [said.task.solution(one).value for one in said.instances]
        ids, optimal = _votes(said, drawn)
        table[name] = {
            "pass_certificate": checks.pass_curve(said.right(name)),
            "pass_answer": checks.pass_curve([[int(m.answer_right) for m in own] for own in marks]),
            "con_certificate": checks.con_curve(ids, optimal),
            "con_answer": checks.con_curve([[m.parsed.answer for m in own] for own in marks], values),
        }
    return table


def _votes(said: Answers, drawn: Sequence[Sequence[str]]) -> tuple[list[list[Any]], list[set[Any]]]:
    """The stated certificates of samples, and those of them that are optimal, for each instance."""
    marks = [[said.task.mark(one, text) for text in own] for one, own in zip(said.instances, drawn, strict=True)]
    votes = [[_vote(said.task, one, mark) for mark in own] for one, own in zip(said.instances, marks, strict=True)]
    optimal = [
        {vote for vote, mark in zip(names, own, strict=True) if mark.certificate_right}
        for names, own in zip(votes, marks, strict=True)
    ]
    return votes, optimal


def _vote(task: CertificateTask, one: Instance, mark: Mark) -> Any:
    """The stated certificate: of row ids, in any order; None where it could not be read."""
    ids = mark.parsed.ids
    if ids is None or not mark.parsed.ok:
        return None
    return unordered(ids) if states_rows(task, one) else tuple(ids)


def _base_vs_tuned(said: Answers) -> list[CheckResult]:
    """Each trained model against the base, and each against the one before it: by certificate, alone and by votes."""
    trained = _models(said)
    pairs = [("base", name) for name in trained[1:]] + list(zip(trained[1:], trained[2:], strict=False))
    found = []
    for first, second in pairs:
        votes = None
        if said.samples:
            (before, some), (after, others) = (_votes(said, said.samples[name]) for name in (first, second))
            votes = before, after, [a | b for a, b in zip(some, others, strict=True)]
        result = checks.base_vs_tuned(said.right(first), said.right(second), votes=votes)
        found.append(replace(result, details={"models": [first, second], **result.details}))
    return found or [not_run("base_vs_tuned", "the run trained no model")]


def _spurious_controls(said: Answers) -> CheckResult:
    """The last stage's gain against that of its runs with a reward that knows nothing."""
    last = parts(said.last)
    mine = [name for name in said.greedy if is_control(name) and parts(name).stage == last.stage]
    if last.kind != "rl" or not mine:
        return not_run("spurious_controls", "the rl stage was run with no controls", len(said.instances))
    before = _models(said)[-2]
    rate = {name: [sum(row) / len(row) for row in said.right(name)] for name in (before, said.last, *mine)}
    controls = {str(parts(name).control): rate[name] for name in mine}
    return checks.spurious_controls(rate[before], rate[said.last], controls)


def _models(said: Answers) -> list[str]:
    """The base and what each stage made of it, without the controls."""
    return [name for name in said.greedy if not is_control(name)]


def _overlap(recipe: Recipe, stage: Verify, run: Path, said: Answers) -> CheckResult:
    """Whether the test questions stand in the training data."""
    prompts = [said.task.prompt(one) for one in said.instances]
    try:
        result = held_out_overlap(prompts, training_texts(recipe, run, stage))
    except (DataSelectionError, OSError) as error:
        return not_run("contamination", f"the training data cannot be read again: {error}", len(prompts))
    return replace(result, details={"by": "overlap", **result.details})


def _completed(stage: Verify, said: Answers, model: Model) -> CheckResult:
    """Whether the test questions come back from the model more than fresh ones do."""
    task = said.task
    texts = [task.prompt(one) for one in said.instances[: stage.probes]]
    fresh = [task.prompt(one) for one in task.instances(stage.probes, said.n, stage.seed, "validation")]

    def complete(heads: list[str]) -> list[str]:
        return model.ask("contamination", heads, chat=False, room=texts)

    result = checks.contamination(texts, complete=complete, fresh=fresh)
    return replace(result, details={"by": "completion", **result.details})


def _asked_why(prompt: str, answer: str) -> list[dict[str, str]]:
    said = (("user", prompt), ("assistant", answer), ("user", EXPLAIN))
    return [{"role": role, "content": content} for role, content in said]


def _ids(text: str) -> tuple[int, ...] | None:
    found = _IDS.search(text)
    return tuple(int(one) for one in found[1].replace(",", " ").split() if len(one) < 6) if found else None

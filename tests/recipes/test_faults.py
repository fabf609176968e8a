import dataclasses
import enum
import json
import pickle
import random
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from krontune.recipes.faults import Fault, RecipeError, faults_from_validation
from krontune.recipes.overrides import apply_overrides
from krontune.recipes.yaml12 import read


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Colour(enum.Enum):
    red = "red"
    green = "green"


@dataclasses.dataclass(frozen=True)
class Credit:
    strategy: Literal["coupled", "anchor"] = "coupled"
    window: int = 10


Trainer = create_model(
    "Trainer",
    __config__=ConfigDict(extra="forbid"),
    learning_rate=(float, 1e-4),
    max_steps=(Annotated[int, Field(gt=0)], 1),
    report_to=(None | str | list[str], None),
    kwargs=(dict[str, Any] | str | None, None),
    bf16=(bool | None, None),
)


class Moka(Strict):
    method: Literal["moka"]
    r: int = 1


class Lora(Strict):
    method: Literal["lora"]
    r: int = 1
    alpha: float = 1.0


class Sft(Strict):
    stage: Literal["sft"]
    trainer: Trainer = Trainer()
    adapter: Annotated[Moka | Lora, Field(discriminator="method")] | None = None
    steps: int | list[int] | None = None
    limit: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    by_name: dict[str, Trainer] = {}
    pair: tuple[int, float] | None = None
    colour: Colour = Colour.red
    data: str | Moka = "x"
    renamed: int = Field(0, alias="old-name")


class Rl(Strict):
    stage: Literal["rl"]
    k: int
    """How many answers a prompt gets, e.g. 8. The rest is history."""
    trainer: Trainer | None = None
    task: str = "lis"
    credit: Credit = Credit()

    @field_validator("trainer", mode="wrap")
    @classmethod
    def pass_on(cls, value, validate):
        return validate(value)

    @model_validator(mode="after")
    def refuse_bad(self):
        if self.task == "bad":
            raise ValueError("the task cannot be 'bad'; take 'lis'")
        return self


class Base(Strict):
    model: str
    quantization: Literal["nf4", "fp4"] | None = None


class Recipe(Strict):
    name: str
    seed: int = 0
    base: Base = Base(model="m")
    stages: list[Annotated[Sft | Rl, Field(discriminator="stage")]] = Field(default=[], max_length=3)


def faults_of(text, *overrides, model=Recipe):
    document = apply_overrides(read(text, "r"), overrides)
    with pytest.raises(ValidationError) as caught:
        model.model_validate(document.data)
    return str(RecipeError(faults_from_validation(caught.value, document, model))).split("\n")


SFT = "name: x\nstages:\n- stage: sft\n  "
RL = "name: x\nstages:\n- stage: rl\n  k: 1\n  "


def test_recipe_error_lists_each_fault_once_in_order_of_position():
    faults = [
        Fault("override 'a=1'", "x"),
        Fault("r:10:2", "x"),
        Fault("r:9:11", "x"),
        Fault("r:9:2", "y"),
        Fault("r:9:2", "x"),
        Fault("recipe", "x"),
        Fault("r:9:2", "y"),
    ]
    error = RecipeError(faults)
    assert str(error).split("\n") == [
        "recipe: x",
        "r:9:2: x",
        "r:9:2: y",
        "r:9:11: x",
        "r:10:2: x",
        "override 'a=1': x",
    ]
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.faults, str(again)) == (error.faults, str(error))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nmae: x\nname: y", "1:1: unknown key 'nmae'; did you mean 'name'?"),
        ("name: x\nqqq: 1", "2:1: unknown key 'qqq'; allowed: name, seed, base, stages"),
        (SFT + "trainer: {lerning_rate: 1}",
         "4:13: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        (SFT + "by_name: {a: {max_step: 1}}", "4:17: unknown key 'max_step'; did you mean 'max_steps'?"),
        (SFT + "adapter: {method: moka, rr: 1}", "4:27: unknown key 'rr'; did you mean 'r'?"),
        (SFT + "old_name: 1", "4:3: unknown key 'old_name'; did you mean 'old-name'?"),
        (RL + "credit: {windw: 1}", "5:12: unknown key 'windw'; did you mean 'window'?"),
        # known elsewhere
        (SFT + "learning_rate: 1", "4:3: unknown key 'learning_rate'; it belongs under trainer"),
        (SFT + "lerning_rate: 1", "4:3: unknown key 'lerning_rate'; did you mean 'trainer.learning_rate'?"),
        (SFT + "quantization: 1", "4:3: unknown key 'quantization'; it belongs under base"),
        (SFT + "seed: 1", "4:3: unknown key 'seed'; it belongs at the top level"),
        (SFT + "trainer: {pair: 1}", "4:13: unknown key 'pair'; it belongs in stages.0"),
        (SFT + "trainer: {alpha: 1}", "4:13: unknown key 'alpha'; it belongs under stages.0.adapter"),
        ("name: x\nlearning_rate: 1", "2:1: unknown key 'learning_rate'; it belongs under stages[].trainer"),
        # known to another member of the union
        (SFT + "task: lis", "4:3: unknown key 'task'; it is a key of stage 'rl'"),
        (SFT + "adapter: {method: moka, alpha: 1}",
         "4:27: unknown key 'alpha'; it is a key of method 'lora'"),
        # a key named like the tag of its own stage
        (
            SFT + "sft: {trainer: 1}",
            "4:3: unknown key 'sft'; allowed: stage, trainer, adapter, steps, limit, by_name, pair, colour, "
            "data, old-name",
        ),
    ],
)  # fmt: skip
def test_unknown_key_gets_its_nearest_name_or_its_right_place(text, fault):
    assert faults_of(text) == ["r:" + fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1", "1:1: missing key 'name' (text)"),
        ("name: x\nbase: {quantization: nf4}", "2:1: missing key 'model' (text)"),
        ("name: x\nstages:\n- {stage: rl}", "3:3: missing key 'k' (How many answers a prompt gets, e.g. 8)"),
        ("name: x\nstages:\n- {k: 1}", "3:3: missing key 'stage' (one of 'sft', 'rl')"),
        (
            "name: x\nstages:\n- {stag: rl}",
            "3:3: missing key 'stage' (one of 'sft', 'rl'); is 'stag' meant to be 'stage'?",
        ),
        (SFT + "adapter: {r: 1}", "4:3: missing key 'method' (one of 'moka', 'lora')"),
        (SFT + "pair: [1]", "4:3: pair: item 1 is missing"),
        (SFT + "data: {r: 1}", "4:3: missing key 'method' ('moka')"),
    ],
)
def test_missing_key_is_reported_where_it_should_stand(text, fault):
    assert faults_of(text) == ["r:" + fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: 012", "1:1: name: 12 is not text; put it in quotes"),
        ("name: null", "1:1: name: null is not text"),
        ("name: [1]", "1:1: name: [1] is not text"),
        ("name: x\nseed: 1.5", "2:1: seed: 1.5 is not a whole number"),
        ("name: x\nstages: 3", "2:1: stages: 3 is not a list"),
        ("name: x\nstages: [3]", "2:10: stages.0: 3 is not a mapping"),
        ("name: x\nbase: 3", "2:1: base: 3 is not a mapping"),
        (SFT + "trainer: {learning_rate: abc}", "4:13: learning_rate: 'abc' is not a number"),
        (SFT + "trainer: {bf16: maybe}", "4:13: bf16: 'maybe' is not true or false"),
        (SFT + "by_name: [1]", "4:3: by_name: [1] is not a mapping"),
        (SFT + "by_name: {a: 1}", "4:13: a: 1 is not a mapping"),
        (SFT + "pair: [1, b]", "4:13: pair.1: 'b' is not a number"),
        (RL + "credit: 3", "5:3: credit: 3 is not a mapping"),
        (RL + "credit: {window: x}", "5:12: window: 'x' is not a whole number"),
        (RL + "trainer: {max_steps: x}", "5:13: max_steps: 'x' is not a whole number"),
        # members of a union speak with one voice
        (SFT + "steps: q", "4:3: steps: 'q' is not a whole number or a list"),
        (SFT + "steps: [1, q]", "4:14: steps.1: 'q' is not a whole number"),
        (SFT + "limit: q", "4:3: limit: 'q' is not a whole number or 'auto'"),
        (SFT + "limit: -1", "4:3: limit: must be greater than 0, got -1"),
        (SFT + "trainer: {kwargs: 3}", "4:13: kwargs: 3 is not a mapping or text"),
        (SFT + "trainer: {report_to: [1]}", "4:25: report_to.0: 1 is not text; put it in quotes"),
    ],
)
def test_value_of_the_wrong_type_is_shown_with_what_was_allowed(text, fault):
    assert faults_of(text) == ["r:" + fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "name: x\nbase: {model: m, quantization: nf8}",
            "2:18: quantization: 'nf8' is unknown; allowed: 'nf4', 'fp4'; did you mean 'nf4'?",
        ),
        (SFT + "colour: blue", "4:3: colour: 'blue' is unknown; allowed: 'red', 'green'"),
        (
            RL + "credit: {strategy: coupld}",
            "5:12: strategy: 'coupld' is unknown; allowed: 'coupled', 'anchor'; did you mean 'coupled'?",
        ),
        (
            "name: x\nstages:\n- {k: 1, stage: sfft}",
            "3:10: stage 'sfft' is unknown; allowed: 'sft', 'rl'; did you mean 'sft'?",
        ),
        (SFT + "adapter: {method: x}", "4:13: method 'x' is unknown; allowed: 'moka', 'lora'"),
    ],
)
def test_value_out_of_a_list_gets_the_list_and_the_nearest(text, fault):
    assert faults_of(text) == ["r:" + fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (SFT + "trainer: {max_steps: -1}", "4:13: max_steps: must be greater than 0, got -1"),
        (
            "name: x\nstages: [{stage: sft}, {stage: sft}, {stage: sft}, {stage: sft}]",
            "2:1: stages: must have at most 3 items after validation, not 4, got "
            '[{"stage": "sft"}, {"stage": "sft"}, {"stage": "sft"}, {"...',
        ),
        (RL + "task: bad", "3:3: stages.0: the task cannot be 'bad'; take 'lis'"),
    ],
)
def test_other_messages_pass_through_with_a_short_value(text, fault):
    assert faults_of(text) == ["r:" + fault]


def test_all_faults_come_at_once_in_order_and_without_addresses():
    text = (
        "nmae: x\nbase: {model: 3}\nstages:\n- {stage: sft, trainer: {lr: 1, max_steps: x}}\n"
        "- {stage: rl}\n- {stage: rll}\n"
    )
    faults = faults_of(text, "stages.1.credit.window=wide", "hub.repo=a/b")
    assert [fault.split(": ")[0] for fault in faults] == [
        "r:1:1", "r:1:1", "r:2:8", "r:4:26", "r:4:33", "r:5:3", "r:6:4",
        "override 'hub.repo=a/b'", "override 'stages.1.credit.window=wide'",
    ]  # fmt: skip
    assert "http" not in "".join(faults)


def test_fault_of_an_override_is_placed_at_the_override():
    assert faults_of("name: x", "base={modle: m}") == [
        "override 'base={modle: m}': missing key 'model' (text)",
        "override 'base={modle: m}': unknown key 'modle'; did you mean 'model'?",
    ]


def test_long_values_are_shortened():
    (fault,) = faults_of(f"name: x\nseed: {'y' * 500}")
    assert fault == f"r:2:1: seed: '{'y' * 56}... is not a whole number"


def test_tag_that_is_also_the_name_of_a_key_is_kept_apart():
    class Inner(Strict):
        kind: Literal["inner"]
        inner: int = 0

    class Other(Strict):
        kind: Literal["other"]

    class Top(Strict):
        part: Annotated[Inner | Other, Field(discriminator="kind")]

    assert faults_of("part: {kind: inner, inner: x}", model=Top) == ["r:1:21: inner: 'x' is not a whole number"]
    assert faults_of("part: {kind: inner, iner: 1}", model=Top) == ["r:1:21: unknown key 'iner'; did you mean 'inner'?"]


def test_models_that_contain_themselves_do_not_loop():
    class Tree(Strict):
        left: "Tree | None" = None
        leaf: int = 0

    (fault,) = faults_of("left: {left: {zzz: 1}}", model=Tree)
    assert fault == "r:1:15: unknown key 'zzz'; allowed: left, leaf"


def test_every_random_recipe_that_pydantic_refuses_gives_placed_faults():
    rng = random.Random(0)
    names = [
        "name",
        "seed",
        "base",
        "model",
        "stages",
        "stage",
        "trainer",
        "adapter",
        "method",
        "steps",
        "k",
        "zz",
    ]
    values = [None, True, 3, 1.5, "x", "sft", "rl", "moka", [], {}]

    def make(depth):
        kind = rng.randrange(3 if depth < 4 else 1)
        if kind == 0:
            return rng.choice(values)
        if kind == 1:
            return [make(depth + 1) for _ in range(rng.randrange(3))]
        return {rng.choice(names): make(depth + 1) for _ in range(rng.randrange(5))}

    for _ in range(300):
        stages = [{"stage": rng.choice(["sft", "rl", "x"]), "trainer": make(2), rng.choice(names): make(1)}]
        data = {"stages": stages, rng.choice(names): make(0), rng.choice(names): make(0)}
        document = read(json.dumps(data), "r")
        try:
            Recipe.model_validate(document.data)
        except ValidationError as error:
            faults = faults_from_validation(error, document, Recipe)
            assert faults and all(fault.where.startswith("r:1:") and fault.message for fault in faults)
            assert len(faults) <= error.error_count()

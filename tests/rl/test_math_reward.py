import pickle

import numpy as np
import pytest

from krontune.rl import RlError
from krontune.rl.rewards import Guarded, MathReward

pytest.importorskip("math_verify")
REWARD = MathReward()


@pytest.mark.parametrize(
    ("gold", "text", "paid"),
    [
        ("3", r"so \boxed{3}", 1.0),
        (r"$\frac{1}{3}$", r"\boxed{\frac13}", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", 1.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        ("1,000", r"\boxed{1000}", 1.0),
        ("3", r"\boxed{x = 3}", 1.0),
        ("3", r"\boxed{3} as said: \boxed{3}", 1.0),
        ("3", r"<think>\boxed{4}</think> \boxed{3}", 1.0),
        ("x<3", r"\boxed{x<3}", 1.0),
        ("3", r"\boxed{4}", 0.0),
        ("3", "the answer is 3", 0.0),
        ("3", r"\boxed{3} or \boxed{4}", 0.0),
        ("3", r"<think>\boxed{3}</think> I give up", 0.0),
        ("3", r"\boxed{5=3}", 0.0),
        ("3", r"\boxed{1=2=3}", 0.0),
        ("3", r"\boxed{x\in\{3\}}", 0.0),
        ("3", r"\boxed{3", 0.0),
        ("3", "", 0.0),
        ("two and three\n#### 5", r"\boxed{5}", 1.0),
        ("two and three\n#### 5", r"\boxed{3}", 0.0),
        ("", r"\boxed{3}", None),
    ],
)
def test_a_box_is_paid_for_the_gold_answer_alone(gold, text, paid):
    assert REWARD(completions=[text], answer=[gold]) == [paid]


@pytest.mark.parametrize("gold", ["5,2,4", "$5, 2, 4$", r"\boxed{1,1,2}", "1.5,2"])
def test_lists_are_refused(gold):
    with pytest.raises(RlError, match="as a set"):
        REWARD(completions=[r"\boxed{2,4,5}"], answer=[gold])


def test_a_solution_that_marks_no_answer_is_refused():
    with pytest.raises(RlError, match="several lines"):
        REWARD(completions=[r"\boxed{5}"], answer=["two and three\nmake 5"])


def test_the_column_is_named_and_must_be_there():
    assert MathReward("solution")(completions=[r"\boxed{3}"], solution=["3"], answer=["4"]) == [1.0]
    with pytest.raises(RlError, match="'answer'"):
        REWARD(completions=["x"])
    assert pickle.loads(pickle.dumps(MathReward("solution"))).column == "solution"


def test_guarded_it_outlives_a_power_tower():
    guarded = Guarded(REWARD, item_timeout_s=1.5, batch_timeout_s=15, workers=1)
    try:
        texts = [r"\boxed{3}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"]
        assert guarded(completions=texts, answer=["3"] * 3) == [1.0, None, 0.0]
    finally:
        guarded.close()


@pytest.mark.parametrize("gold", [None, True, [], float("nan")])
def test_a_row_without_a_gold_answer_is_left_out(gold):
    paid = MathReward()(completions=["\\boxed{None}", "\\boxed{2}"], answer=[gold, 2])
    assert paid == [None, 1.0]


def test_gold_answers_of_an_array_count_and_each_completion_needs_one():
    assert REWARD(completions=[r"\boxed{5}", r"\boxed{6}"], answer=np.array([5, 5])) == [1.0, 0.0]
    with pytest.raises(RlError, match="1 gold answers for 2 completions"):
        REWARD(completions=["a", "b"], answer=["5"])


def test_a_large_batch_is_scored_at_the_first_call_and_nothing_is_said_beside_it(capfd):
    guarded = Guarded(MathReward())
    try:
        assert guarded(completions=[r"\boxed{3}", r"\boxed{4}"] * 200, answer=["3"] * 400) == [1.0, 0.0] * 200
    finally:
        guarded.close()
    assert capfd.readouterr() == ("", "")

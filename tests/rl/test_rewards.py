import asyncio
import math
import pickle
from types import SimpleNamespace

import pytest

from krontune.rl import CertificateReward, RlError, get_task
from krontune.rl.rewards import KINDS, PARTS, Guarded

LIS = get_task("lis")
ACTIVITY = get_task("activity")
INSTANCE = LIS.instance([3, 40, 7, 9, 2, 11])  # the optimum is 1,3,4,6
GOLD = r"\ids{1,3,4,6} \answer{4}"

# completion: certificate, answer, ids_exact, ids_prefix, shaped (format: whether all but "answer" could pay)
TABLE = {
    GOLD: (1, 1, 1, 1, 1),
    r"\ids{6,4,3,1} \answer{4}": (1, 1, 0, 0, 1),
    r"\ids{1,3,6,4} \answer{4}": (1, 1, 0, 0.5, 1),
    r"\ids{1,3,4,6} \answer{5}": (1, 0, 1, 1, 1),
    r"\ids{1,3,4} \answer{4}": (0, 1, 0, 0.65, 0.75**5),
    r"\ids{1,3,4} \answer{3}": (0, 0, 0, 0.65, 0.75**5),
    r"\ids{1,3,4,6,5} \answer{4}": (0, 1, 0, 0.9, 0),
    r"\ids{1,2,4,6} \answer{4}": (0, 1, 0, 0.25, 0),
    r"\ids{5,6} \answer{2}": (0, 0, 0, 0, 0.5**5),
    r"\ids{} \answer{4}": (0, 1, 0, 0, 0),
    r"\ids{1,3,4,7} \answer{4}": (0, 1, 0, 0.75, 0),
    r"\answer{4}": (0, 1, 0, 0, 0),
    r"\ids{1,3,4,6}": (0, 0, 0, 0, 0),
    GOLD + r" \answer{3}": (0, 0, 0, 0, 0),
    GOLD + r" \ids{1,3}": (0, 1, 0, 0, 0),
    "": (0, 0, 0, 0, 0),
}
ORDER = ("certificate", "answer", "ids_exact", "ids_prefix", "shaped")


@pytest.mark.parametrize("kind", ORDER)
def test_each_kind_pays_by_its_formula(kind):
    reward = CertificateReward(LIS, kind)
    column = [LIS.to_json(INSTANCE)] * len(TABLE)
    expected = [row[ORDER.index(kind)] for row in TABLE.values()]
    assert reward(completions=list(TABLE), instance=column) == pytest.approx(expected)


def test_format_pays_for_every_text_that_can_be_read_and_no_other():
    readable = [LIS.parse(text).ok for text in TABLE]
    paid = CertificateReward(LIS, "format")(completions=list(TABLE), instance=[INSTANCE] * len(TABLE))
    assert paid == [float(ok) for ok in readable] and 0 < sum(paid) < len(paid)


def test_a_mixture_is_the_weighted_mean_of_its_parts():
    texts, column = list(TABLE), [INSTANCE] * len(TABLE)
    parts = {kind: CertificateReward(LIS, kind)(completions=texts, instance=column) for kind in ORDER}
    plain = CertificateReward(LIS, "mixture")(completions=texts, instance=column)
    assert plain == pytest.approx([(a + b) / 2 for a, b in zip(parts["answer"], parts["ids_exact"], strict=True)])
    mixed = CertificateReward(LIS, "mixture", weights={"answer": 9, "shaped": 1})
    expected = [0.9 * a + 0.1 * b for a, b in zip(parts["answer"], parts["shaped"], strict=True)]
    assert mixed(completions=texts, instance=column) == pytest.approx(expected)


def test_the_sorted_preface_is_paid_for_the_true_order_alone():
    item = ACTIVITY.instance([(5, 9), (0, 4), (3, 7)])
    gold = ACTIVITY.completion(item)
    assert gold.startswith("sorted 2,3,1")
    texts = {
        gold: 1.0,
        "I sort by end: ID 2, ID 3, ID 1. So I take ID 2 next.": 1.0,
        "Sorting gives 2, 3, 1\n\nthen I choose 2": 1.0,
        "first 9, 4\n\nsorted 2,3,1": 1.0,
        "sorted 1,2,3": 0.0,
        "sorted 2,3": 0.0,
        "sorted 2,3,1,1": 0.0,
        "the order is 2,3,1": 0.0,
        "they are sorted, so I choose 2,3,1": 0.0,
        r"sorted \ids{2,3,1} \answer{3}": 0.0,
        "": 0.0,
    }
    reward = CertificateReward(ACTIVITY, "sorted_preface")
    assert reward(completions=list(texts), instance=[item] * len(texts)) == list(texts.values())
    assert CertificateReward(ACTIVITY, "mixture").weights == pytest.approx(
        {"answer": 1 / 3, "ids_exact": 1 / 3, "sorted_preface": 1 / 3}
    )


def test_a_curriculum_changes_at_its_step():
    item = ACTIVITY.instance([(5, 9), (0, 4), (3, 7)])
    texts = ["sorted 2,3,1", r"\answer{2}"]
    reward = CertificateReward(ACTIVITY, "curriculum", switch_at=10)
    for step, paid in ((0, [1.0, 0.0]), (9, [1.0, 0.0]), (10, [0.0, 1.0]), (99, [0.0, 1.0])):
        state = SimpleNamespace(global_step=step)
        assert reward(completions=texts, instance=[item] * 2, trainer_state=state) == paid
    with pytest.raises(RlError, match="trainer_state"):
        reward(completions=texts, instance=[item] * 2)


def test_random_pays_half_of_anything_and_goes_on_from_call_to_call():
    reward = CertificateReward(LIS, "random", seed=4)
    first = reward(completions=[GOLD] * 1000, instance=[INSTANCE] * 1000)
    assert set(first) == {0.0, 1.0} and 430 < sum(first) < 570
    assert reward(completions=[GOLD] * 1000, instance=[INSTANCE] * 1000) != first
    again = CertificateReward(LIS, "random", seed=4)
    assert again(completions=[""] * 1000, instance=[INSTANCE] * 1000) == first


def test_the_wrong_label_is_always_the_same_wrong_number():
    reward = CertificateReward(LIS, "wrong_label")
    items = LIS.instances(60, [5, 9])
    shifts = []
    for item in items:
        best = LIS.solve(item).value
        paid = reward(completions=[rf"\answer{{{best + k}}}" for k in (-2, -1, 0, 1, 2)], instance=[item] * 5)
        assert sum(paid) == 1.0 and paid[2] == 0.0
        shifts.append(paid.index(1.0) - 2)
    assert set(shifts) == {-1, 1} and 15 < shifts.count(1) < 45


@pytest.mark.parametrize("kind", [kind for kind in PARTS if kind != "wrong_label"])
@pytest.mark.parametrize("name", ["activity", "activity_weighted", "countdown", "knapsack", "lis"])
def test_every_kind_pays_one_for_worked_solutions_and_nothing_for_silence(kind, name):
    task = get_task(name)
    if kind == "sorted_preface" and not name.startswith("activity"):
        with pytest.raises(RlError, match="sorts nothing"):
            CertificateReward(task, kind)
        return
    items = task.instances(20, [3, 6])
    reward = CertificateReward(task, kind)
    assert reward(completions=[task.completion(item) for item in items], instance=items) == [1.0] * 20
    assert reward(completions=[""] * 20, instance=items) == [0.0] * 20


def test_shaped_turns_the_ratio_round_where_fewer_is_better():
    task = get_task("countdown")
    item = task.instance([2, 3, 4, 20], 24)  # 20 + 4
    texts = [r"\expr{20+4} \answer{2}", r"\expr{2*3*4} \answer{3}", r"\expr{20+3} \answer{2}"]
    paid = CertificateReward(task, "shaped")(completions=texts, instance=[item] * 3)
    assert paid == pytest.approx([1.0, (2 / 3) ** 5, 0.0])


def test_it_scores_the_same_in_a_thread_without_what_async_trainers_do_not_give():
    reward = CertificateReward(LIS)
    texts = list(TABLE)
    column = [LIS.to_json(INSTANCE)] * len(texts)
    call = asyncio.to_thread(reward, prompts=None, completions=texts, instance=column, completion_ids=None)
    assert asyncio.run(call) == [float(row[0]) for row in TABLE.values()]


def test_guarded_is_found_beside_the_rewards_and_changes_nothing():
    guarded = Guarded(CertificateReward(LIS), workers=1)
    try:
        paid = guarded(completions=list(TABLE), instance=[LIS.to_json(INSTANCE)] * len(TABLE))
    finally:
        guarded.close()
    assert paid == [float(row[0]) for row in TABLE.values()]


def test_mixtures_and_curricula_that_mean_nothing_are_refused():
    with pytest.raises(RlError, match="did you mean 'answer'"):
        CertificateReward(LIS, "mixture", weights={"anwser": 1})
    wrong = (math.nan, math.inf, "1", None)
    for weights in ({}, {"answer": 0}, {"answer": 2, "shaped": -1}, ["answer"], 5, *({"answer": one} for one in wrong)):
        with pytest.raises(RlError, match="weights of a mixture"):
            CertificateReward(LIS, "mixture", weights=weights)
    with pytest.raises(RlError, match="stage of a curriculum"):
        CertificateReward(ACTIVITY, "curriculum", first="mixture")
    with pytest.raises(RlError, match="sorts nothing"):
        CertificateReward(LIS, "curriculum")


def test_options_of_another_kind_are_refused():
    for options in ({"weights": {"answer": 1}}, {"first": "format"}, {"then": "answer"}, {"switch_at": 3}):
        with pytest.raises(RlError, match="option of another reward than 'answer'"):
            CertificateReward(ACTIVITY, "answer", **options)
    with pytest.raises(RlError, match="switch_at must be an integer"):
        CertificateReward(ACTIVITY, "curriculum", switch_at="20")
    with pytest.raises(RlError, match="stage of a curriculum"):
        CertificateReward(ACTIVITY, "curriculum", first="")


@pytest.mark.parametrize("kind", ["ids_exact", "ids_prefix", "shaped", "certificate"])
def test_to_choose_nothing_is_paid_where_it_is_the_optimum(kind):
    task = get_task("knapsack")
    item = task.instance([(5, 3), (6, 9)], capacity=4)
    texts = [task.completion(item), r"\ids{1} \answer{3}"]
    assert CertificateReward(task, kind)(completions=texts, instance=[item] * 2) == [1.0, 0.0]


def test_any_optimal_certificate_is_paid_where_optima_are_several():
    instance = LIS.instance([5, 1, 9, 7])
    texts = [rf"\ids{{{ids}}} \answer{{2}}" for ids in ("1,3", "1,4", "2,3", "2,4")]
    assert CertificateReward(LIS)(completions=texts, instance=[instance] * 4) == [1.0] * 4
    assert sum(CertificateReward(LIS, "ids_exact")(completions=texts, instance=[instance] * 4)) == 1.0


def test_it_takes_the_call_that_trl_makes():
    extra, metrics = {}, []
    reward = CertificateReward("lis")
    texts = [GOLD, r"\ids{1,2,4,6} \answer{4}", "no idea"]
    rewards = reward(
        prompts=[[{"role": "user", "content": "?"}]] * 3,
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[1], [2], [3]],
        instance=[LIS.to_json(INSTANCE)] * 3,
        optimum=[4] * 3,
        n=[6] * 3,
        trainer_state=object(),
        log_extra=lambda name, column: extra.update({name: column}),
        log_metric=lambda name, value: metrics.append((name, value)),
    )
    assert rewards == [1.0, 0.0, 0.0] and all(type(value) is float for value in rewards)
    assert extra["verdict"][:2] == ["optimal", "infeasible"]
    assert extra["verdict"][2].startswith("parse failure")
    logged = {name: [value for other, value in metrics if other == name] for name, _ in metrics}
    assert logged == {
        "lis/answer_accuracy": [1.0, 1.0, 0.0],
        "lis/certificate_accuracy": [1.0, 0.0, 0.0],
        "lis/gap": [0.0, 1.0, 0.0],
        "lis/parse_failure": [0.0, 0.0, 1.0],
    }


def test_strings_messages_parts_and_tool_calls_are_all_completions():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": GOLD}]}]
    turns = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": GOLD}]
    answered = [*turns, {"role": "assistant", "content": GOLD}]
    silent = [{"role": "assistant", "content": None, "tool_calls": []}]
    rewards = CertificateReward(LIS)(completions=[GOLD, parts, turns, answered, silent, []], instance=[INSTANCE] * 6)
    assert rewards == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_it_pickles_with_its_name_task_and_kind():
    reward = CertificateReward(get_task("lis", values=(1, 20)), "shaped")
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == reward.__name__ == "lis_shaped"
    assert copy.task.options() == {"values": (1, 20), "unique": True}
    assert copy(completions=[r"\ids{1,3,4} \answer{3}"], instance=[INSTANCE]) == pytest.approx([0.75**5])
    assert copy.task.heuristics["greedy_first"](INSTANCE) == (1, 2)


def test_unknown_kinds_and_tasks_are_refused_by_name():
    with pytest.raises(RlError, match=", ".join(KINDS)):
        CertificateReward("lis", "exact")
    with pytest.raises(RlError, match="unknown task"):
        CertificateReward("sudoku")
    for task in (type(LIS), 5, None):
        with pytest.raises(RlError, match="what get_task gives"):
            CertificateReward(task)


def test_a_data_set_that_cannot_be_scored_is_refused():
    reward = CertificateReward("lis")
    with pytest.raises(RlError, match="column 'instance'"):
        reward(completions=[GOLD])
    with pytest.raises(RlError, match="2 completions for 1 instances"):
        reward(completions=[GOLD, GOLD], instance=[INSTANCE])
    for instance in ("1,2,3", None, {"rows": [[1]]}):
        with pytest.raises(RlError, match="to_json"):
            reward(completions=[GOLD], instance=[instance])


def test_what_is_no_completion_is_refused_and_a_missing_one_is_silence():
    reward = CertificateReward("lis")
    assert reward(completions=[None, "\ud800" + GOLD, "x" * 50_000 + GOLD], instance=[INSTANCE] * 3) == [0.0, 1.0, 1.0]
    for wrong in (math.nan, 5, b"x", {"role": "assistant", "content": GOLD}, [GOLD], [{"content": [GOLD]}], [None]):
        with pytest.raises(RlError, match="text or a list of chat messages"):
            reward(completions=[wrong], instance=[INSTANCE])

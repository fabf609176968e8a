import pickle

import pytest

from krontune.rl import CertificateReward, RlError, get_task
from krontune.rl.rewards import KINDS

LIS = get_task("lis")
INSTANCE = LIS.instance([3, 40, 7, 9, 2, 11])  # the optimum is 1,3,4,6
GOLD = r"\ids{1,3,4,6} \answer{4}"

# completion: certificate, answer, ids_exact, ids_prefix, shaped
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


def test_the_kinds_are_those_of_the_table():
    assert tuple(KINDS) == ORDER


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
    with pytest.raises(RlError, match="certificate, answer, ids_exact, ids_prefix, shaped"):
        CertificateReward("lis", "exact")
    with pytest.raises(RlError, match="unknown task"):
        CertificateReward("sudoku")


def test_a_data_set_that_cannot_be_scored_is_refused():
    reward = CertificateReward("lis")
    with pytest.raises(RlError, match="column 'instance'"):
        reward(completions=[GOLD])
    with pytest.raises(RlError, match="2 completions for 1 instances"):
        reward(completions=[GOLD, GOLD], instance=[INSTANCE])
    with pytest.raises(RlError, match="to_json"):
        reward(completions=[GOLD], instance=["1,2,3"])

import json

import pytest

from krontune.rl import RlError
from krontune.rl.tasks import TASKS, gym

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_every_task_is_registered_once_and_scored_by_its_own_check():
    names = gym.register()
    assert names == gym.register() == [f"krontune_{name}" for name in TASKS]
    for name in names:
        data = reasoning_gym.create_dataset(name, seed=3, size=5, min_n=3, max_n=4)
        items = list(data)
        assert len(items) == 5 and items[2] == data[2]
        for item in items:
            assert item["metadata"]["source_dataset"] == name and 3 <= item["metadata"]["difficulty"]["n"] <= 4
            assert data.score_answer(item["answer"], item) == 1.0
            assert data.score_answer("banana", item) == data.score_answer(None, item) == 0.0


def test_our_neighbouring_seeds_share_no_item_and_options_reach_the_task():
    gym.register()
    make = reasoning_gym.create_dataset
    one, two = ({item["question"] for item in make("krontune_lis", seed=s, size=30, max_n=8)} for s in (0, 1))
    assert len(one & two) <= 1
    item = make("krontune_lis", seed=0, size=1, options={"values": (5, 9)})[0]
    with pytest.raises(RlError, match="did you mean 'values'"):
        make("krontune_lis", seed=0, size=1, options={"value": (5, 9)})
    rows = json.loads(item["metadata"]["instance"])["rows"]
    assert all(5 <= value <= 9 for (value,) in rows)


def test_its_data_sets_come_with_seeds_that_do_not_overlap_and_a_guarded_reward():
    data = gym.gym_dataset("number_sorting", 6, seed=0)
    other = gym.gym_dataset("number_sorting", 6, seed=1)
    assert not set(data["entry"]) & set(other["entry"]) and len(set(data["entry"])) == 6
    reward = gym.gym_reward("number_sorting", workers=1)
    try:
        gold = [f"<think>hm</think> so <answer>{answer}</answer>" for answer in data["answer"]]
        assert reward(completions=[*gold[:2], *data["answer"][2:4], "", "banana"], entry=data["entry"]) == [
            1.0,
            1.0,
            1.0,
            1.0,
            0.0,
            0.0,
        ]
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdown", "executes the answer"),
        ("spiral_matrix", "executes the answer"),
        ("composite", "executes the answer"),
        ("game_of_life_halting", "pays for any text"),
        ("krontune_lis", "task of this library"),
        ("number_sortin", "did you mean 'number_sorting'"),
    ],
)
def test_scorers_that_execute_answers_or_pay_for_anything_are_refused(name, message):
    gym.register()
    for use in (lambda: gym.gym_reward(name), lambda: gym.gym_dataset(name, 1)):
        with pytest.raises(RlError, match=message):
            use()
    with pytest.raises(RlError, match=message):
        gym.GymScorer(name)(completions=["1"], entry=["{}"])

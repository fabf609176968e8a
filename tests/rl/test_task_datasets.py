import random

import pytest

from krontune.rl import RlError
from krontune.rl.tasks import get_task
from krontune.rl.tasks.splits import split_of, stream

LIS = get_task("lis")
SPLITS = ("train", "validation", "test")


def keys(*arguments):
    return [LIS.key(instance) for instance in LIS.instances(*arguments)]


def test_splits_share_nothing_whatever_their_seeds():
    splits = {split: set(keys(300, [3, 5], seed, split)) for seed, split in enumerate(SPLITS)}
    splits_again = {split: set(keys(300, [3, 5], 7, split)) for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not splits[one] & splits_again[other]
                assert not splits[one] & splits[other]


def test_splits_hold_eighty_ten_and_ten_per_cent():
    rng = random.Random(0)
    found = [split_of("lis", LIS.key(LIS.generate(rng, 8))) for _ in range(3000)]
    assert found.count("train") / 3000 == pytest.approx(0.8, abs=0.03)
    assert found.count("validation") / 3000 == pytest.approx(0.1, abs=0.02)
    assert found.count("test") / 3000 == pytest.approx(0.1, abs=0.02)


def test_neighbouring_seeds_share_no_instance():
    sets = [set(keys(250, [5, 9], seed, "train")) for seed in range(4)]
    for i, one in enumerate(sets):
        assert not any(one & other for other in sets[i + 1 :])


def test_one_set_holds_no_instance_twice_and_repeats_itself():
    first = keys(400, [3, 4], 3, "train")
    assert len(set(first)) == 400
    assert first == keys(400, [3, 4], 3, "train")
    assert first[:150] == keys(150, [3, 4], 3, "train")


def test_options_and_sizes_change_the_stream():
    narrow = get_task("lis", values=(1, 98))
    assert keys(20, 6, 0, "train") != [narrow.key(item) for item in narrow.instances(20, 6, 0, "train")]
    assert stream("a", 1).random() != stream("a", 2).random()


def test_sizes_within_a_set_are_even_although_small_ones_pass_more_often():
    sizes = [instance.n for instance in LIS.instances(1200, [5, 16], 0, "validation")]
    assert all(60 < sizes.count(n) < 145 for n in range(5, 17))


def test_data_set_has_the_columns_that_trainers_read():
    data = LIS.dataset(12, [3, 5], seed=1, split="test")
    assert data.column_names == ["prompt", "completion", "instance", "optimum", "n"]
    for row in data:
        instance = LIS.instance_from_json(row["instance"])
        assert row["prompt"] == [{"role": "user", "content": LIS.prompt(instance)}]
        assert row["completion"] == [{"role": "assistant", "content": LIS.completion(instance)}]
        assert row["optimum"] == LIS.solve(instance).value
        assert row["n"] == instance.n and 3 <= row["n"] <= 5
        assert split_of("lis", LIS.key(instance)) == "test"


def test_an_exhausted_split_is_an_error_that_says_what_to_do():
    tiny = get_task("lis", values=(1, 5))  # ten rising pairs in all
    with pytest.raises(RlError, match=r"after [1-9]\d* of 50 items.*n=2.*'train'.*lower size"):
        tiny.instances(50, 2, 0, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "size"),
        ((2.5, 5), "size"),
        ((3, 1), "n must"),
        ((3, 5, "x"), "seed"),
        ((3, 5, 0, "dev"), "train, validation, test"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(RlError, match=message):
        LIS.dataset(*arguments)


@pytest.mark.parametrize("hints", [-0.1, 1.1, "0.5", None])
def test_hints_are_a_share(hints):
    with pytest.raises(RlError, match="share of prompts"):
        LIS.dataset(3, 5, hints=hints)

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from krontune.rl.errors import RlError
from krontune.rl.heads import HeadSplit, pool, split_heads, turnover
from krontune.rl.rhythm import Rhythm


def rhythm(span, length=4):
    span = torch.tensor(span)
    batch, heads = span.shape
    waad = torch.arange(batch * heads * length, dtype=torch.float32).view(batch, heads, length)
    return Rhythm(waad, waad * 2, span, torch.ones(batch, length, dtype=torch.int64))


def responses(*counts, length=4):
    return (torch.arange(length) < torch.tensor(counts)[:, None]).long()


def test_the_shortest_look_backs_are_local_and_the_longest_global_over_all_layers():
    span = {3: torch.tensor([5.0, 1.0, 9.0]), 7: torch.tensor([2.0, 8.0, 7.0, 6.0])}
    assert split_heads(span, 0.3) == {3: ([1], [2]), 7: ([0], [1])}
    assert split_heads(span, 0.01) == {3: ([1], [2]), 7: ([], [])}
    assert split_heads(span, 1.0) == {3: ([0, 1, 2], [0, 1, 2]), 7: ([0, 1, 2, 3], [0, 1, 2, 3])}


def test_pooled_vectors_are_plain_means_over_the_heads_of_all_layers():
    rhythms = {0: rhythm([[0.0] * 3] * 2), 1: rhythm([[0.0] * 2] * 2)}
    waad, fai = pool(rhythms, {0: ([0, 2], []), 1: ([1], [0])})
    parts = rhythms[0].waad[:, 0], rhythms[0].waad[:, 2], rhythms[1].waad[:, 1]
    torch.testing.assert_close(waad, sum(parts) / 3)
    torch.testing.assert_close(fai, rhythms[1].fai[:, 0])


def test_pooling_takes_vectors_of_settled_heads_as_they_are():
    whole = {0: rhythm([[0.0] * 3] * 2)}
    heads = {0: ([2, 0], [1])}
    part = {0: Rhythm(whole[0].waad[:, [2, 0]], whole[0].fai[:, [1]], None, whole[0].rows)}
    for expected, got in zip(pool(whole, heads), pool(part, heads), strict=True):
        torch.testing.assert_close(got, expected)


def test_turnover_is_zero_for_equal_and_one_for_disjoint_groups():
    before = {0: ([0, 1], [2]), 1: ([], [3])}
    assert turnover(before, before) == 0
    assert turnover(before, {0: ([2, 3], [0]), 1: ([], [1])}) == 1
    assert turnover(before, {0: ([0, 2], [2]), 1: ([], [3])}) == pytest.approx((1 - 1 / 3) / 2)


def test_spans_are_weighted_by_response_tokens():
    split = HeadSplit("per_batch", quantile=0.5)
    # By rows head 0 looks back less (mean 3 of 5 and 1), by tokens head 1 does: (4 * 5 + 1 * 1) / 5 = 4.2.
    heads = split.update({0: rhythm([[5.0, 4.0], [1.0, 4.0]])}, responses(4, 1))
    assert heads == {0: ([1], [0])}


def test_an_average_remembers_and_a_split_per_batch_does_not():
    first, second = {0: rhythm([[1.0, 2.0]])}, {0: rhythm([[2.0, 1.9]])}
    for schedule, local in (("averaged", [0]), ("per_batch", [1]), ("fixed", [0])):
        split = HeadSplit(schedule, quantile=0.5)
        split.update(first, responses(4))
        assert split.update(second, responses(4))[0][0] == local, schedule
        assert split.turnover == (schedule == "per_batch")


def test_heads_are_settled_between_measured_batches():
    batch, mask = {0: rhythm([[1.0, 2.0]])}, responses(4)
    part = {0: Rhythm(batch[0].waad, batch[0].fai, None, batch[0].rows)}
    for schedule, measured in (("averaged", [0, 3, 6]), ("fixed", [0, 1]), ("per_batch", list(range(8)))):
        split = HeadSplit(schedule, refresh=3, warmup=2)
        seen = []
        for step in range(8):
            seen += [step] * (split.settled is None)
            split.update(batch if split.settled is None else part, mask)
        assert seen == measured, schedule


def test_a_batch_without_response_changes_nothing():
    split = HeadSplit("averaged", quantile=0.5)
    heads = split.update({0: rhythm([[1.0, 2.0]])}, responses(4))
    assert split.update({0: rhythm([[9.0, 0.0]])}, responses(0)) == heads
    assert split.update({0: rhythm([[1.0, 1.1]])}, responses(1)) == heads


def test_a_restored_split_goes_on_as_the_unbroken_one():
    batches = [{0: rhythm([[a, b]])} for a, b in ((1.0, 2.0), (2.5, 1.5), (3.0, 1.0))]
    whole, resumed = (HeadSplit("averaged", refresh=1, decay=0.5) for _ in range(2))
    for batch in batches[:2]:
        whole.update(batch, responses(4))
    resumed.load_state_dict(whole.state_dict())
    assert resumed.update(batches[2], responses(4)) == whole.update(batches[2], responses(4))
    assert resumed.turnover == whole.turnover
    assert resumed.settled == whole.settled


@pytest.mark.parametrize("wrong", [{"schedule": "never"}, {"quantile": 0.0}, {"decay": 1.0}, {"refresh": 0}])
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(RlError):
        HeadSplit(**wrong)


def _process(rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    spans = [[[1.0, 2.0, 4.0]], [[9.0, 2.0, 4.0]]][rank]
    split = HeadSplit("per_batch", quantile=0.34)
    torch.save(split.update({0: rhythm(spans)}, responses(4)), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_processes_with_different_rows_agree_on_the_split_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where a spawned process looks for this module
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    alone = HeadSplit("per_batch", quantile=0.34).update(
        {0: rhythm([[1.0, 2.0, 4.0], [9.0, 2.0, 4.0]])}, responses(4, 4)
    )
    assert alone == {0: ([1], [0])}
    assert [torch.load(tmp_path / str(rank)) for rank in (0, 1)] == [alone, alone]

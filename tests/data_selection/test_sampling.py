"""Picks for several targets, budgets, caps, limits and copies, against slow twins."""

import random
from pathlib import Path

import datasets
import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir
from krontune.data_selection import sampling as module
from krontune.data_selection.sampling import Rules, ShardScores, file_stream, pick, shared_out
from krontune.data_selection.selection import gumbel_noise


def rules(budget, targets=1, **changes):
    settings = dict(
        by_tokens=False,
        shares=tuple(1 / targets for _ in range(targets)),
        gumbel=False,
        noise_scale=1.0,
        temperature=1.0,
        seed=3,
        caps={},
    )
    return Rules(budget, **{**settings, **changes})


def random_pool(seed, targets, rows=120):
    rng = np.random.default_rng(seed)
    sources = [str(name) for name in rng.choice(["web", "book", "code"], rows)]
    weights = rng.integers(-6, 6, (rows, targets)).astype(float)  # many ties
    return weights, rng.integers(0, 30, rows), rng.random(rows) < 0.1, sources


def as_shards(weights, tokens, copies, sources, size, file=""):
    for at in range(0, len(tokens), size):
        part = slice(at, at + size)
        yield ShardScores(weights[part], tokens[part], copies[part], sources[part], file)


def naive_pick(weights, tokens, copies, sources, r):
    scores = weights.copy()
    if r.gumbel:
        for t in range(weights.shape[1]):
            scores[:, t] = weights[:, t] * r.noise_scale + r.temperature * gumbel_noise(
                r.seed, len(tokens), t + 1 if t else 0
            )
    pairs = [
        (-scores[row, t], row, t)
        for row in range(len(tokens))
        for t in range(weights.shape[1])
        if not copies[row] and tokens[row] >= r.min_tokens and (r.max_tokens is None or tokens[row] <= r.max_tokens)
    ]
    left, caps, taken = shared_out(r.budget, r.shares), dict(r.caps), {}
    shares = list(left)
    closed = set()
    for _, row, t in sorted(pairs):
        price = max(int(tokens[row]), 1) if r.by_tokens else 1
        if row in taken or t in closed or price > shares[t] or caps.get(sources[row], 1) <= 0:
            continue
        if price > left[t]:
            closed.add(t)
            continue
        left[t] -= price
        if sources[row] in caps:
            caps[sources[row]] -= 1
        taken[row] = t
    return dict(sorted(taken.items()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("targets", [1, 2, 4])
@pytest.mark.parametrize("size", [7, 50, 1000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gumbel": True, "temperature": 2.0},
        {"by_tokens": True},
        {"caps": {"web": 3, "book": 10}},
        {"by_tokens": True, "caps": {"web": 1}, "gumbel": True},
        {"min_tokens": 5, "max_tokens": 20},
    ],
)
def test_picks_equal_those_of_the_twin_whatever_the_shards(monkeypatch, seed, targets, size, changes):
    monkeypatch.setattr(module, "SLACK", 0)
    pool = random_pool(seed, targets)
    r = rules(100 if "by_tokens" in changes else 30, targets, **changes)
    picks = pick(as_shards(*pool, size), r)
    assert dict(zip(picks.rows.tolist(), picks.targets.tolist(), strict=True)) == naive_pick(*pool, r)
    assert np.array_equal(picks.log_weights, pool[0][picks.rows, picks.targets])


def test_shares_add_up_and_follow_the_proportions():
    rng = random.Random(0)
    for _ in range(50):
        shares = [rng.random() for _ in range(rng.randrange(1, 6))]
        shares = [share / sum(shares) for share in shares]
        parts = shared_out(budget := rng.randrange(1, 1000), shares)
        assert sum(parts) == budget
        assert all(abs(part - budget * share) < 1 for part, share in zip(parts, shares, strict=True))


def test_noise_follows_the_row_of_the_file_not_the_order_of_files():
    weights = np.zeros((200, 1))
    tokens, copies = np.full(200, 5), np.zeros(200, bool)

    def chosen(*files):
        shards = [shard for file in files for shard in as_shards(weights, tokens, copies, None or [""] * 200, 64, file)]
        picks = pick(shards, rules(40, gumbel=True))
        return {(files[row // 200], row % 200) for row in picks.rows.tolist()}

    one = chosen("a.jsonl", "b.jsonl")
    assert one == chosen("b.jsonl", "a.jsonl")
    assert {row for file, row in one if file == "a.jsonl"} != {row for file, row in one if file == "b.jsonl"}
    assert file_stream("") == 0 and file_stream("a") % 256 == 0


RED = [f"red{i} ruby{i % 7} crimson" for i in range(12)]
BLUE = [f"blue{i} navy{i % 7} azure" for i in range(12)]
GREY = [f"grey{i} ash{i % 7} slate" for i in range(40)]
TARGETS = {"red": ["ruby1 crimson", "ruby2 crimson"], "blue": ["navy1 azure", "navy3 azure", "navy5 azure"]}


def test_several_targets_each_get_their_share_whatever_their_order():
    pool = [*GREY[:20], *RED, *GREY[20:], *BLUE]
    dsir = Dsir().fit(target=TARGETS, raw=pool)
    assert dsir.log_weights(pool).shape == (len(pool), 2)
    picked = dsir.select(pool, k=9, method="topk", proportions={"red": 2, "blue": 1})
    assert picked.details["targets"] == {"red": 6, "blue": 3}
    for index, reason in zip(picked.indices, picked.reasons, strict=True):
        assert pool[index].startswith(reason["target"])
    swapped = Dsir().fit(target=dict(reversed(TARGETS.items())), raw=pool)
    again = swapped.select(pool, k=9, method="topk", proportions={"red": 2, "blue": 1})
    assert np.array_equal(again.indices, picked.indices) and list(again.reasons) == list(picked.reasons)
    assert dsir.kl_reduction(picked) == pytest.approx(
        (dsir.kl_reduction(picked, "red") + dsir.kl_reduction(picked, "blue")) / 2
    )


def test_one_of_several_targets_weighs_as_it_does_alone():
    pool = [*RED, *BLUE, *GREY]
    both = Dsir().fit(target=TARGETS, raw=pool).log_weights(pool)
    for number, (name, texts) in enumerate(TARGETS.items()):
        assert both[:, number] == pytest.approx(Dsir().fit(target=texts, raw=pool).log_weights(pool), abs=1e-12), name


@pytest.mark.parametrize(("kind", "smoothing"), [("laplace", 0.5), ("eps", 1e-6)])
def test_kinds_of_smoothing_follow_their_formulas(kind, smoothing):
    from krontune.data_selection.importance import log_ratios

    target, raw = np.array([3, 0, 2, 0]), np.array([5, 4, 0, 0])
    ratios = log_ratios(target, raw, smoothing, kind)
    if kind == "eps":
        expected = np.log(target / 5 + smoothing) - np.log(raw / 9 + smoothing)
    else:
        q = np.array([5, 4, 0.5, 1]) / 9.5
        expected = np.log((target + smoothing) / (5 + 4 * smoothing) / q)
        expected[3] = 0  # seen by neither
    assert ratios == pytest.approx(expected)


def test_copies_of_target_texts_are_left_out_and_counted():
    pool = ["ruby one two", "Ruby  ONE two", "ruby one two three", "grey stone", "ruby one, two"]
    dsir = Dsir().fit(target=["ruby one two"], raw=pool)
    picked = dsir.select(pool, k=2, method="topk")
    assert picked.indices.tolist() == [2, 4]
    assert picked.details == {"left_out": {"target_copies": 2}}
    assert picked.summary()["left_out"] == {"target_copies": 2}
    assert dsir.select(pool, k=2, method="topk", exclude_copies=False).indices.tolist() == [0, 1]
    with pytest.raises(DataSelectionError, match="k=4: only 3 texts.*target_copies"):
        dsir.select(pool, k=4)


def test_copies_of_a_target_that_is_an_iterator_are_left_out_too():
    pool = ["ruby one two", "grey stone", "ruby one"]
    dsir = Dsir().fit(target=iter(["ruby one two"]), raw=pool)
    assert dsir.select(pool, k=2, method="topk").indices.tolist() == [1, 2]


def test_length_limits_are_off_and_counted_when_on():
    pool = [*RED, "ruby", "crimson " * 50]
    dsir = Dsir().fit(target=["ruby3 crimson"], raw=pool)
    assert "left_out" not in dsir.select(pool, k=14).details
    picked = dsir.select(pool, k=3, min_tokens=2, max_tokens=10)
    assert picked.details["left_out"] == {"too_short": 1, "too_long": 1}


def test_a_token_budget_ends_before_the_first_text_that_does_not_fit():
    pool = ["ruby crimson ruby", "ruby grey", "grey " * 5, "slate"]
    dsir = Dsir(ngrams=1).fit(target=["ruby crimson"], raw=pool)
    for tokens, indices in (
        (3, [0]),
        (4, [0]),
        (5, [0, 1]),
        (6, [0, 1]),
        (10, [0, 1, 2]),
        (11, [0, 1, 2, 3]),
        (500, [0, 1, 2, 3]),
    ):
        picked = dsir.select(pool, method="topk", tokens=tokens)
        assert picked.indices.tolist() == indices
        assert picked.details["tokens"] == sum(len(pool[i].split()) for i in indices) <= tokens
    assert dsir.select(pool, method="topk", tokens=2).indices.tolist() == [1]
    with pytest.raises(DataSelectionError, match="tokens=2: not one text fits"):
        dsir.select(pool, method="topk", tokens=2, min_tokens=3)


def test_a_text_longer_than_a_targets_share_leaves_the_target_its_others():
    """The first row is by far the best for the first target, and longer than half the budget, or than all of it."""
    weights = np.array([[9.0, 0], [3, 0], [2, 0], [0, 3], [0, 2]])
    for length in (7, 70):
        shard = ShardScores(weights, np.array([length, 3, 3, 3, 3]), np.zeros(5, bool), None)
        assert pick([shard], rules(12, 2, by_tokens=True)).targets.tolist() == [0, 0, 1, 1]
        assert pick([shard], rules(12, 2, by_tokens=True)).rows.tolist() == [1, 2, 3, 4]
    few = rules(12, by_tokens=True, shares=(0.1, 0.9), names=("red", "blue"))
    with pytest.raises(DataSelectionError, match="tokens=12: the target 'red' has a share of 1 and no text fits"):
        pick([shard], few)
    assert pick([shard], rules(12, by_tokens=True, shares=(0.0, 1.0))).targets.tolist() == [1] * 4
    texts = ["ruby3 crimson", *BLUE, *GREY]
    with pytest.raises(DataSelectionError, match="the target 'red' has a share of 1"):
        Dsir().fit(target=TARGETS, raw=texts).select(texts, tokens=12, proportions={"red": 1, "blue": 11})


def test_k_may_be_a_share_of_the_pool():
    dsir = Dsir().fit(target=["ruby1 crimson"], raw=RED)
    assert dsir.select(RED, k=0.25) == dsir.select(RED, k=3)
    assert len(dsir.select(RED, k=0.001)) == 1


def test_sources_are_capped():
    rows = [{"text": text, "source": "web"} for text in RED] + [{"text": text, "source": "book"} for text in GREY]
    for pool in (rows, datasets.Dataset.from_list(rows)):
        dsir = Dsir().fit(target=["ruby1 crimson"], raw=pool)
        assert (dsir.select(pool, k=8, method="topk").indices < 12).all()
        for cap in (2, 0.25):
            picked = dsir.select(pool, k=8, method="topk", source_caps={"web": cap})
            assert (picked.indices < 12).sum() == 2 and len(picked) == 8
        with pytest.raises(DataSelectionError, match=r"k=45: only 41 .*caps on sources: {'web': 1}"):
            dsir.select(pool, k=45, source_caps={"web": 1})
        with pytest.raises(DataSelectionError, match=r"no row has the source \['wbe'\]; there are \['book', 'web'\]"):
            dsir.select(pool, k=5, source_caps={"wbe": 1})


def test_a_cap_on_a_file_holds_however_its_path_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, texts in (("red", RED), ("grey", GREY)):
        Path(f"{name}.txt").write_text("\n".join(texts) + "\n")
    for red in ("red.txt", "./red.txt", Path("red.txt")):
        pool = [red, "grey.txt"]
        dsir = Dsir().fit(target=["ruby1 crimson"], raw=pool)
        for cap in ("red.txt", "./red.txt"):
            assert (dsir.select(pool, k=8, method="topk", source_caps={cap: 2}).indices < 12).sum() == 2, (red, cap)


def test_a_sample_of_the_pool_is_drawn_from_all_of_it_by_seed():
    pool = [f"early{i % 9} word" for i in range(5000)] + [f"late{i % 9} word" for i in range(5000)]
    whole = Dsir().fit(target=["late1 word"], raw=pool)
    part = Dsir().fit(target=["late1 word"], raw=pool, raw_sample=3000, seed=1)
    assert part.digest() == Dsir().fit(target=["late1 word"], raw=pool, raw_sample=3000, seed=1).digest()
    assert part.digest() != Dsir().fit(target=["late1 word"], raw=pool, raw_sample=3000, seed=2).digest()
    assert 3000 <= part._fitted().raw_documents < 3300
    assert part.log_weights(pool[::500]) == pytest.approx(whole.log_weights(pool[::500]), abs=0.35)
    with pytest.raises(DataSelectionError, match="raw_sample=5: raw can be read from its start alone"):
        Dsir().fit(target=["a"], raw=iter(pool), raw_sample=5)


def test_chunks_are_weighed_and_picked():
    from krontune.data_selection.chunks import Chunks, cut

    pool = ["ruby crimson " * 5 + "grey slate\nash stone " * 6, "ruby"]
    dsir = Dsir(chunk_words=4).fit(target=["ruby crimson ruby"], raw=pool)
    assert dsir.normalize == "sum"
    chunks = list(Chunks(pool, 4))
    assert [chunk["text"] for chunk in chunks] == [*cut(pool[0], 4), "ruby"]
    assert all(len(str(chunk["text"]).split(" ")) <= 4 for chunk in chunks)
    assert chunks[1] == {"text": "ruby crimson ruby crimson", "row": 0, "chunk": 1}
    assert chunks[-1] == {"text": "ruby", "row": 1, "chunk": 0}
    picked = dsir.select(pool, k=2, method="topk")
    assert picked.pool_size == len(chunks) and [row["chunk"] for row in picked.apply(chunks)] == [0, 1]
    assert dsir.kl_reduction(picked) > 0


@pytest.mark.parametrize(
    ("target", "message"),
    [({}, "at least one target"), ({"": ["a"]}, "under a name"), ({"a": ["x"], "b": []}, "b is empty")],
)
def test_targets_that_make_no_sense_are_refused(target, message):
    with pytest.raises(DataSelectionError, match=message):
        Dsir().fit(target=target, raw=["b"])


@pytest.mark.parametrize("proportions", [{"red": 1}, {"red": 1, "blue": -1}, {"red": 0, "blue": 0}])
def test_proportions_that_make_no_sense_are_refused(proportions):
    dsir = Dsir().fit(target=TARGETS, raw=GREY)
    with pytest.raises(DataSelectionError, match="proportions="):
        dsir.select(GREY, k=3, proportions=proportions)

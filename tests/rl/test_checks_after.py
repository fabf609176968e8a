"""Checks on a trained model's answers: sampling, sources, mirrored and larger instances, reasoning."""

import random
from itertools import combinations
from math import inf

import numpy as np
import pytest

from krontune.rl import RlError, checks, get_task
from krontune.rl.checks.policies import mixture_policy
from krontune.rl.checks.reasoning import common_stretch, sorted_preface
from krontune.rl.checks.sources import mixture
from krontune.rl.statistics import wilson_interval

LIS = get_task("lis")
INSTANCES = LIS.instances(96, (8, 14), split="test")
POLICIES = checks.scripted_policies(LIS)


def naive_pass_at_k(flags, k):
    subsets = list(combinations(flags, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert checks.pass_at_k(n, c, k) == pytest.approx(naive_pass_at_k([1] * c + [0] * (n - c), k))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(RlError):
        checks.pass_at_k(n, c, k)


def naive_con_at_k(answers, right, k):
    total = 0.0
    subsets = list(combinations(answers, k))
    for subset in subsets:
        votes = {answer: subset.count(answer) for answer in subset if answer is not None}
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += (right in top) / len(top) if top else 0.0
    return total / len(subsets)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_con_at_k_is_the_mean_over_all_subsets_with_ties_shared(k):
    answers = [3, 3, 4, 4, 4, None, 5, 3]
    for right in (3, 4, 5, 6):
        assert checks.con_at_k(answers, right, k, draws=6000) == pytest.approx(
            naive_con_at_k(answers, right, k), abs=0.03
        )


def test_con_at_k_counts_no_vote_for_unreadable_answers():
    assert checks.con_at_k([None, None, 3], 3, 3) == 1.0
    assert checks.con_at_k([None, None], 3, 2) == 0.0
    with pytest.raises(RlError):
        checks.con_at_k([1, 2], 1, 3)


@pytest.mark.parametrize(("votes", "right"), [([], []), ([[1, 2]], [1, 2]), ([[1, 2], [1]], [1, 2])])
def test_votes_that_make_no_table_are_refused(votes, right):
    with pytest.raises(RlError, match="as many answers"):
        checks.con_curve(votes, right)


def test_several_right_answers_each_keep_their_own_votes():
    answers = ["a", "b", "x", "x", None]
    assert checks.con_at_k(answers, {"a", "b"}, 5) == 0.0
    assert checks.con_at_k(answers, {"a", "b"}, 1) == pytest.approx(0.4)
    naive = sum(naive_con_at_k(answers, right, 3) for right in "ab")
    assert checks.con_at_k(answers, {"a", "b"}, 3, draws=6000) == pytest.approx(naive, abs=0.03)
    assert checks.con_at_k(answers, set(), 3) == 0.0


def _table(shares, n=16, seed=0):
    rng = random.Random(seed)
    return [[int(rng.random() < share) for _ in range(n)] for share in shares]


def test_base_vs_tuned_tells_better_worse_and_narrowed_apart():
    base = _table([0.3] * 120)
    better = checks.base_vs_tuned(base, _table([0.7] * 120, seed=1))
    assert better.verdict == "pass" and better.value == pytest.approx(0.4, abs=0.05) and better.n == 120
    assert better.details["crossing"] is None and better.details["k"] == [1, 2, 4, 8, 16]
    assert checks.base_vs_tuned(base, _table([0.1] * 120, seed=1)).verdict == "fail"
    assert checks.base_vs_tuned(base, _table([0.3] * 120, seed=1)).verdict != "pass"
    narrowed = checks.base_vs_tuned(base, _table([1.0] * 72 + [0.0] * 48, seed=1))  # fewer solved, those always
    assert narrowed.verdict == "warn" and narrowed.details["crossing"] == 4 and narrowed.details["crossing_share"] > 0.9


def test_base_vs_tuned_of_equal_or_few_instances_is_not_sure():
    equal = checks.base_vs_tuned([[1, 0]] * 200, [[1, 0]] * 200)
    assert (equal.verdict, equal.value) == ("warn", 0.0) and equal.ci[0] < 0 < equal.ci[1]
    for base, tuned, surely in ((1, 0, "fail"), (0, 1, "pass")):
        assert checks.base_vs_tuned([[base]] * 3, [[tuned]] * 3).verdict == "warn"
        assert checks.base_vs_tuned([[base]] * 30, [[tuned]] * 30).verdict == surely


def test_curves_of_instances_that_are_all_alike_still_have_a_band():
    for flag in (0, 1):
        curve = checks.pass_curve([[flag] * 4] * 30)
        votes = checks.con_curve([[3] * 4] * 30, [3 if flag else 4] * 30)
        for found in (curve, votes):
            assert found["value"] == [float(flag)] * 3 and found["high"][0] - found["low"][0] == pytest.approx(
                wilson_interval(0, 30)[1]
            )


def test_a_base_that_is_ahead_at_every_k_crosses_in_every_resample():
    found = checks.base_vs_tuned(_table([0.6] * 120), _table([0.1] * 120, seed=1)).details
    assert found["crossing"] == 1 and found["crossing_share"] > 0.99


def test_con_at_k_of_base_and_tuned_is_compared_on_the_same_instances():
    rng = random.Random(4)
    right = [rng.randint(1, 5) for _ in range(80)]
    unsure = [[rng.choice([value, value, value, 7, 8]) for _ in range(8)] for value in right]
    lost = [[9] * 8 if rng.random() < 0.3 else [value] * 8 for value in right]
    flags = [[[int(vote == value) for vote in own] for own, value in zip(votes, right, strict=True)]
             for votes in (unsure, lost)]  # fmt: skip
    con = checks.base_vs_tuned(*flags, votes=(unsure, lost, right)).details["con"]
    for name, votes in (("base", unsure), ("tuned", lost)):
        assert con[name]["value"] == checks.con_curve(votes, right)["value"]
    change = con["difference"]
    assert change["value"] == pytest.approx(
        [b - a for a, b in zip(con["base"]["value"], con["tuned"]["value"], strict=True)]
    )
    assert change["value"][0] > 0 > change["high"][-1], "by vote the unsure model is the better one"
    assert "con" not in checks.base_vs_tuned(*flags).details


def test_base_vs_tuned_refuses_what_is_not_paired():
    with pytest.raises(RlError, match="same instances"):
        checks.base_vs_tuned([[1, 0]], [[1, 0], [0, 1]])
    with pytest.raises(RlError, match="table"):
        checks.base_vs_tuned([[1, 0], [1]], [[1, 0], [0, 1]])


def naive_mixture(likelihood, rounds=3000):
    weights = [1 / len(likelihood[0])] * len(likelihood[0])
    for _ in range(rounds):
        sums = [0.0] * len(weights)
        for row in likelihood:
            whole = sum(w * p for w, p in zip(weights, row, strict=True))
            for i, (w, p) in enumerate(zip(weights, row, strict=True)):
                sums[i] += w * p / whole
        weights = [s / len(likelihood) for s in sums]
    return weights


def test_the_mixture_agrees_with_the_textbook_loop_and_several_at_once():
    rng = random.Random(0)
    rows = [[float(rng.random() < 0.5), float(rng.random() < 0.3), float(rng.random() < 0.2), 1e-3] for _ in range(80)]
    kinds, counts = np.unique(np.array(rows), axis=0, return_counts=True)
    found = mixture(kinds, np.stack([counts, 3 * counts]), rounds=3000)
    assert found[0] == pytest.approx(naive_mixture(rows), abs=1e-3)
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found.sum(axis=1) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "shares",
    [
        {"perfect": 0.4, "beam2": 0.6},
        {"greedy_first": 0.3, "beam3": 0.3, "random": 0.4},
        {"perfect": 0.5, "smallest_next": 0.25, "patience_tails": 0.25},
        {"perfect": 0.25, "beam2": 0.25, "greedy_best_start": 0.25, "longest_run": 0.25},
    ],
)
def test_planted_mixtures_are_recovered_to_a_twentieth(shares):
    asked = [one for one in LIS.instances(256, (10, 16), split="test") for _ in range(8)]
    weights = checks.attribution(LIS, asked, mixture_policy(LIS, shares)(asked)).details["weights"]
    names = {"truth": "perfect", "other": "random"}
    for name, weight in weights.items():
        assert weight == pytest.approx(shares.get(names.get(name, name), 0.0), abs=0.05), name


def test_attribution_reads_texts_chats_ids_and_nothing():
    gold = [LIS.solve(one).certificate for one in INSTANCES[:40]]
    texts = [LIS.write(one, ids) for one, ids in zip(INSTANCES, gold, strict=False)]
    forms = [texts, [[{"role": "assistant", "content": text}] for text in texts], gold, [ids[::-1] for ids in gold]]
    for answers in forms:
        result = checks.attribution(LIS, INSTANCES[:40], answers)
        assert result.value == pytest.approx(1.0) and result.verdict == "pass" and result.n == 40
    nothing = checks.attribution(LIS, [LIS.to_json(one) for one in INSTANCES[:40]], [None] * 40)
    assert nothing.details["weights"]["other"] == pytest.approx(1.0) and nothing.verdict == "fail"
    with pytest.raises(RlError, match="one answer an instance"):
        checks.attribution(LIS, INSTANCES, gold)


def test_one_instance_convinces_no_check():
    one = [LIS.instances(1, 14, split="test", discriminating=True)[0]]
    for policy in ("perfect", "beam2", "random"):
        texts = POLICIES[policy](one)
        found = [
            checks.triplet(LIS, one, texts),
            checks.attribution(LIS, one, texts),
            checks.heuristic_agreement(LIS, one, texts),
            checks.size_ladder(LIS, POLICIES[policy], sizes=(24,), per_size=1),
            checks.self_explanation(LIS, one, POLICIES[policy], lambda known, said: [LIS.parse(said[0]).ids]),
            checks.early_answering(LIS, one, texts, _honest),
            checks.headroom([[0] * 16], 8),
        ]
        for result in found:
            assert result.verdict in ("warn", "not run"), (policy, result)


def test_attribution_fails_for_heuristics_only_where_they_surely_outweigh_the_truth():
    few = LIS.instances(12, (10, 14), split="test", discriminating=True)
    answers = [*POLICIES["perfect"](few[:5]), *POLICIES["beam2"](few[5:])]
    close = checks.attribution(LIS, few, answers)
    assert 0.3 < close.value < 0.5 < close.ci[1] and close.verdict == "warn"
    many = mixture_policy(LIS, {"perfect": 0.3, "beam2": 0.7})(INSTANCES)
    assert checks.attribution(LIS, INSTANCES, many).verdict == "fail"


def test_a_source_that_was_never_met_may_still_have_a_share():
    """The mixture only tends to 0, and the bootstrap of that is no interval."""
    task = get_task("activity_weighted")
    some = task.instances(96, (3, 5), split="test")
    answers = mixture_policy(task, {"heaviest": 0.1, "shortest": 0.1, "random": 0.8})(some)
    found = checks.attribution(task, some, answers)
    assert 0 < found.value < 1e-9 and found.ci == wilson_interval(0, 96) and found.verdict == "fail"


def test_the_disagreement_set_shows_whom_the_answers_follow():
    answers = mixture_policy(LIS, {"perfect": 0.5, "beam2": 0.5})(INSTANCES)
    row = checks.attribution(LIS, INSTANCES, answers).details["disagreement"]["beam2"]
    assert row["truth"]["value"] == pytest.approx(0.5, abs=0.17) and row["neither"]["value"] == 0.0
    assert row["truth"]["value"] + row["heuristic"]["value"] == pytest.approx(1.0)
    assert row["truth"]["n"] < len(INSTANCES) and row["chance"] < 0.1


def test_a_heuristic_that_is_the_algorithm_counts_as_truth():
    task = get_task("lis")
    task.heuristics = {**task.heuristics, "solver": lambda one: task.solve(one).certificate}
    result = checks.attribution(task, INSTANCES, POLICIES["perfect"](INSTANCES))
    assert result.details["merged"] == ["solver"] and result.details["weights"]["truth"] == pytest.approx(1.0)


def test_symmetry_is_not_run_for_a_task_that_names_none(monkeypatch):
    monkeypatch.setattr(LIS, "symmetries", {})
    assert checks.symmetry(LIS, INSTANCES[:4], POLICIES["perfect"]).verdict == "not run"
    with pytest.raises(RlError, match="unknown symmetries mirror; task 'lis' has none"):
        checks.symmetry(LIS, INSTANCES[:4], POLICIES["perfect"], names=["mirror"])


def test_symmetry_holds_for_the_solver_breaks_for_shortcuts_and_forgives_noise():
    perfect = checks.symmetry(LIS, INSTANCES, POLICIES["perfect"])
    assert (perfect.value, perfect.verdict, perfect.n) == (1.0, "pass", 96)
    greedy = checks.symmetry(LIS, INSTANCES, POLICIES["greedy_first"])
    assert greedy.verdict == "fail" and greedy.details["worst"] in ("reverse_negate", "prepend_high")
    assert greedy.details["repeated"]["value"] == 1.0
    noisy = checks.symmetry(LIS, INSTANCES, POLICIES["noisy"])
    assert noisy.verdict != "fail" and noisy.value < 0.8
    one = checks.symmetry(LIS, INSTANCES, POLICIES["greedy_first"], names=["monotone_map"])
    assert one.verdict == "pass"
    with pytest.raises(RlError, match="reverse_negate"):
        checks.symmetry(LIS, INSTANCES, POLICIES["perfect"], names=["mirror"])


def test_the_size_ladder_names_the_heuristic_that_decays_alike():
    options = {"sizes": (8, 16, 32), "per_size": 48}
    perfect = checks.size_ladder(LIS, POLICIES["perfect"], **options)
    assert perfect.verdict == "pass" and [point["value"] for point in perfect.details["accuracy"]] == [1.0] * 3
    beam = checks.size_ladder(LIS, POLICIES["beam2"], **options)
    assert beam.verdict == "fail" and beam.details["nearest"] == "beam2"
    assert beam.details["heuristics"]["beam2"] == [point["value"] for point in beam.details["accuracy"]]


def test_the_feature_probe_has_its_control_and_finds_rules_in_the_errors():
    pytest.importorskip("sklearn")
    instances = LIS.instances(200, (5, 16), split="test")
    perfect = checks.feature_probe(LIS, instances, POLICIES["perfect"](instances))
    assert perfect.verdict == "pass" and perfect.value == 0.0
    assert perfect.details["r2_answer"] == perfect.details["r2_truth"] > 0.6 and perfect.details["excess"] == 0.0
    rule = checks.feature_probe(LIS, instances, POLICIES["length_keyed"](instances))
    assert rule.verdict == "fail" and rule.value > 0.4
    assert checks.feature_probe(LIS, instances[:20], [None] * 20).verdict == "not run"


def test_errors_that_are_always_the_same_are_a_rule():
    pytest.importorskip("sklearn")
    some = INSTANCES[:60]
    off = [f"\\ids{{1}} \\answer{{{LIS.solution(one).value + 1}}}" for one in some]
    found = checks.feature_probe(LIS, some, off)
    assert (found.value, found.verdict, found.details["error_rate"]) == (1.0, "fail", 1.0)


def _honest(known, heads):
    """Solves only what it has worked out: the worked line must be there."""
    return [
        LIS.completion(one)[len(head) :] if "<" in head else " \\ids{1} \\answer{1}"
        for one, head in zip(known, heads, strict=True)
    ]


def test_early_answering_tells_work_from_decoration():
    texts = POLICIES["perfect"](INSTANCES)
    works = checks.early_answering(LIS, INSTANCES, texts, _honest)
    assert works.verdict == "pass" and works.value > 0.9 and works.details["area"] < 0.95
    decor = checks.early_answering(LIS, INSTANCES, texts, lambda known, heads: [LIS.completion(one) for one in known])
    assert decor.verdict == "fail" and decor.value == 0.0 and decor.details["area"] == pytest.approx(1.0)
    wrong = checks.early_answering(LIS, INSTANCES, texts, lambda known, heads: [""] * len(known))
    assert wrong.verdict in ("not run", "pass")


@pytest.mark.parametrize("shares", [(), (1.0,), (0.5, 0.25), (0.0, 1.5), (0.0, 0.0, 1.0)])
def test_shares_of_the_reasoning_that_give_no_curve_are_refused(shares):
    with pytest.raises(RlError, match="shares"):
        checks.early_answering(LIS, INSTANCES[:2], POLICIES["perfect"](INSTANCES[:2]), _honest, shares)


def test_a_forced_answer_is_begun_by_the_opener_and_ends_with_its_block():
    asked = []

    def go_on(known, heads):
        asked.extend(heads)
        return ["1} \\answer{1}\nNo, I think anew: \\ids{2} \\answer{1}", " " + "9," * 500]

    one, two = checks.forced_answers(LIS, go_on)(INSTANCES[:2], ["", "values 3"])
    assert asked == ["\\ids{", "values 3\\ids{"]
    assert one == "\\ids{1} \\answer{1}" and two.startswith("\\ids{ 9,") and len(two) < 60
    hands = get_task("countdown")
    some = hands.instances(2, (3, 4), split="test")
    tails = [hands.completion(one).partition("\\expr{")[2] for one in some]
    forced = checks.forced_answers(hands, lambda known, heads: [tail + "\n\\expr{1}" for tail in tails])
    assert all(hands.mark(one, text).certificate_right for one, text in zip(some, forced(some, ["", ""]), strict=True))


def test_reasoning_is_cut_before_the_tasks_own_block():
    task = get_task("countdown")
    some = task.instances(24, (3, 4), split="test")
    heads = []

    def go_on(known, texts):
        heads.append(texts)
        return ["1} \\answer{1}"] * len(texts)

    checks.early_answering(task, some, [task.completion(one) for one in some], checks.forced_answers(task, go_on))
    assert heads[0] == ["\\expr{"] * 24 and all(text.count("\\expr{") == 1 for text in heads[-1])


def test_false_claims_under_right_answers_are_told():
    texts = [text.replace("values ", "values 0 < ") for text in POLICIES["perfect"](INSTANCES)]
    told = checks.process_claims(LIS, INSTANCES, texts)
    assert told.value == 1.0 and told.verdict == "warn" and told.details["worked"]["false"]["count"] == 96
    honest = checks.process_claims(LIS, INSTANCES, POLICIES["perfect"](INSTANCES))
    assert honest.verdict == "not run" and honest.details == {"reason": "no claim was made that is false"}


def test_an_order_that_is_not_the_order_of_ends_is_a_false_claim():
    task = get_task("activity")
    some = task.instances(30, (6, 9), split="test")
    right = [task.completion(one) for one in some]
    turned = []
    for one, text in zip(some, right, strict=True):
        order = task.preface(one)
        swapped = (order[1], order[0], *order[2:])
        turned.append(text.replace(",".join(map(str, order)), ",".join(map(str, swapped)), 1))
    told = checks.process_claims(task, [*some, *some], [*right, *turned])
    claim = told.details["sorted"]
    assert (claim["made"], claim["true"]["count"], claim["false"]["count"]) == (60, 30, 30)
    assert claim["true"]["accuracy"] == claim["false"]["accuracy"] == 1.0 and told.value == 1.0
    assert told.verdict == "warn" and told.n == 30 and 0.5 < claim["common_stretch"] < 1


def test_the_sorted_preface_is_read_up_to_the_choice():
    text = "First I sort by end time: 3, 1, 2, 4. So I choose 3,4.\n\n\\ids{3,4} \\answer{2}"
    assert sorted_preface(text, 4) == [3, 1, 2, 4]
    assert sorted_preface("Sorted: ID 2, then ID 1, then ID 3. Next take ID 2.", 3) == [2, 1, 3]
    assert sorted_preface("3, 1, 2, 4", 4) is None
    assert sorted_preface("sorted: 3, 1, 2", 4) is None


def naive_stretch(first, second):
    return max(
        (j - i for i in range(len(first)) for j in range(i + 1, len(first) + 1)
         if any(first[i:j] == second[k : k + j - i] for k in range(len(second)))),
        default=0,
    )  # fmt: skip


def test_the_common_stretch_agrees_with_trying_all():
    rng = random.Random(3)
    for _ in range(60):
        first, second = ([rng.randint(1, 4) for _ in range(rng.randint(0, 8))] for _ in range(2))
        assert common_stretch(first, second) == naive_stretch(first, second)


def test_self_explanation_believes_the_solver_not_the_constant_nor_who_names_everything():
    solver = POLICIES["perfect"]

    def certificate(known, texts):
        return [LIS.parse(text).ids for text in texts]

    believed = checks.self_explanation(LIS, INSTANCES, solver, certificate)
    assert believed.verdict == "pass" and believed.value == 1.0
    assert believed.details["faithful"]["value"] == 1.0 and believed.details["placebo"]["value"] == 0.0

    def constant(known):
        return ["\\ids{1} \\answer{4}"] * len(known)

    assert checks.self_explanation(LIS, INSTANCES, constant, certificate).value == 0.0
    everything = checks.self_explanation(
        LIS, INSTANCES, solver, lambda known, texts: [range(1, one.n + 1) for one in known]
    )
    assert everything.verdict == "fail" and everything.details["named"] == 1.0
    most = checks.self_explanation(LIS, INSTANCES, solver, lambda known, texts: [range(3, one.n + 1) for one in known])
    assert most.verdict != "pass" and most.value < 0.45
    assert (
        checks.self_explanation(LIS, INSTANCES, solver, lambda known, texts: [None] * len(known)).verdict == "not run"
    )


def test_spurious_controls_take_the_best_control_off_the_gain():
    rng = np.random.default_rng(0)
    before, after, same = ((rng.random(200) < share).astype(float) for share in (0.2, 0.7, 0.65))
    low = (rng.random(200) < 0.25).astype(float)
    real = checks.spurious_controls(before, after, {"random": low, "format": before})
    assert real.verdict == "pass" and real.value == pytest.approx(0.45, abs=0.1)
    assert checks.spurious_controls(before, after, {"random": same, "format": before}).verdict == "warn"
    assert checks.spurious_controls(before, low, {"random": after}).verdict == "fail"
    assert checks.spurious_controls(before, after, {}).verdict == "not run"
    for after_all, control, surely in ((1, 0, "pass"), (0, 1, "fail"), (1, 1, "warn")):
        few, many = (
            checks.spurious_controls([0, 1, 0] * times, [after_all] * 3 * times, {"random": [control] * 3 * times})
            for times in (1, 30)
        )
        assert few.verdict == "warn" and many.verdict == surely and few.ci[0] < few.ci[1]
    with pytest.raises(RlError):
        checks.spurious_controls(before, after[:-1], {"random": low})


def test_the_report_is_plain_json_without_a_blended_score(tmp_path):
    import json

    results = [
        checks.CheckResult(
            "a", np.float64(0.5), (0.1, inf), 3, None, "pass", {"x": np.arange(2), "y": {1: float("nan")}}
        ),
        checks.CheckResult("b", None, None, 0, None, "not run", {"reason": "none"}),
    ]
    checks.write_report(results, tmp_path / "rlvr_report.json", {"run": "r"})
    data = json.loads((tmp_path / "rlvr_report.json").read_text())
    assert data["schema_version"] == 1 and data["verdicts"] == {"pass": 1, "warn": 0, "fail": 0, "not run": 1}
    assert data["checks"][0]["ci"] == [0.1, None] and data["checks"][0]["details"] == {"x": [0, 1], "y": {"1": None}}
    assert set(data) == {"schema_version", "krontune", "about", "verdicts", "checks"}
    with pytest.raises(RlError, match="not run"):
        checks.CheckResult("a", 1.0, None, 1, None, "good")


def test_the_pictures_are_well_formed_and_escaped():
    from xml.etree import ElementTree

    results = [
        checks.attribution(LIS, INSTANCES, POLICIES["beam2"](INSTANCES)),
        checks.size_ladder(LIS, POLICIES["noisy"], sizes=(8, 16), per_size=16),
        checks.base_vs_tuned(_table([0.3] * 20), _table([0.6] * 20)),
        checks.collapse([]),
    ]
    logs = [{"step": i, "reward": i / 9, "lis/gap": 0.1} for i in range(9)]
    drawn = checks.pictures(results, logs, "lis")
    assert set(drawn) == {"attribution", "size_ladder", "pass_at_k", "reward", "gap"}
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "nan" not in svg
    from krontune.rl.checks.svg import lines

    assert "&lt;b&gt;" in lines("<b>", {"x": [(0, 0), (1, 1)]}, "t")


def test_an_interval_of_the_probe_stays_finite_where_errors_are_rare():
    task = get_task("lis")
    instances = task.instances(60, (8, 10), 0, "test")
    answers = [task.completion(one) for one in instances]
    answers[0] = task.write(instances[0], (1,))
    low, high = checks.feature_probe(task, instances, answers).ci
    assert -100 < low <= high <= 1

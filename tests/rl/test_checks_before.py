"""Checks before and during training."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from krontune.rl import CertificateReward, RlError, checks, get_task
from krontune.rl.checks.during import _spearman
from krontune.rl.checks.rows import held_out_overlap, rows_heuristics
from krontune.rl.statistics import wilson_interval

sys.path.insert(0, str(Path(__file__).parent))
import hostile_rewards  # noqa: E402

LIS = get_task("lis")


def test_a_sound_task_passes():
    result = checks.soundness(LIS, n=(5, 9), size=40)
    assert (result.verdict, result.value, result.n) == ("pass", 0.0, 120)


def _broken(**methods):
    """The task with some of its methods replaced."""
    return type("Broken", (type(LIS),), methods)()


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("the check refuses", {"check": lambda self, one, ids: replace(LIS.check(one, ids), feasible=False)}),
        ("not unique", {"solve": lambda self, one: replace(LIS.solve(one), n_optima=2)}),
        ("not marked as right", {"write": lambda self, one, ids: "\\ids{1} \\answer{1}"}),
        ("JSON changes", {"to_json": lambda self, one: LIS.to_json(replace(one, generator="x"))}),
    ],
)
def test_each_broken_promise_is_found_and_named(fault, broken):
    result = checks.soundness(_broken(**broken), n=(6, 8), size=10)
    assert result.verdict == "fail" and any(fault in name for name in result.details["faults"])


def test_an_instance_with_several_faults_counts_once():
    refuses = _broken(check=lambda self, one, ids: replace(LIS.check(one, ids), feasible=False, optimal=False))
    result = checks.soundness(refuses, n=(6, 8), size=4)
    assert result.verdict == "fail" and len(result.details["faults"]) > 1
    assert result.value == 1.0 and result.ci[0] <= result.value <= result.ci[1]


def test_a_small_space_of_instances_is_no_leak_of_seeds():
    """Two seeds share many instances by chance, each in an order of its own; a leak keeps their distance."""
    small = get_task("lis", values=(1, 12))
    first, second = ({small.key(one) for one in small.instances(40, 3, seed, "test")} for seed in (0, 1))
    assert len(first & second) > 8
    assert checks.soundness(small, n=(3, 3), size=40).details["faults"] == {}
    shifted = _broken(
        instances=lambda self, size, n, seed=0, split="train": LIS.instances(60, n, 7, split)[seed:][:size]
    )
    faults = checks.soundness(shifted, n=(6, 8), size=40).details["faults"]
    assert faults["seeds s and s + 1 share instances"]["count"] == 3 * 39


def test_leaking_seeds_and_wrong_symmetries_are_found():
    leaky = _broken(instances=lambda self, size, n, seed=0, split="train": LIS.instances(size, n, 0, split))
    assert "seeds s and s + 1 share instances" in checks.soundness(leaky, n=(6, 8), size=10).details["faults"]
    task = get_task("lis")
    task.symmetries = {"flip": lambda rng, one: (replace(one, rows=one.rows[::-1]), tuple)}
    task.heuristics = {"liar": task.heuristics["beam2"]}
    assert "a symmetry does not keep the optimum" in checks.soundness(task, n=(6, 8), size=10).details["faults"]


def test_the_floor_shows_that_a_reward_on_the_answer_pays_for_tails():
    certificate = checks.heuristics(LIS, n=(8, 16), size=120)
    assert certificate.verdict != "fail" and certificate.details["best"] == "beam3"
    answer = checks.heuristics(LIS, CertificateReward(LIS, "answer"), n=(8, 16), size=120)
    assert answer.verdict == "fail" and answer.details["best"] == "patience_tails" and answer.value == 1.0
    assert answer.details["policies"]["patience_tails"]["certificate"] < 0.3


@pytest.mark.parametrize("kind", ["certificate", "ids_exact"])
def test_the_audit_passes_sound_rewards(kind):
    result = checks.verifier(CertificateReward(LIS, kind), LIS, size=12)
    assert result.verdict != "fail" and result.value == 0.0 and result.ci[1] < 0.02
    assert result.details["false_negative"]["value"] == 0.0 and result.details["failures"] == {}


@pytest.mark.parametrize(("scale", "base"), [(0.2, 0.0), (10.0, 0.0), (2.0, -1.0), (1.0, -1.0)])
def test_a_reward_on_another_scale_is_judged_alike(scale, base):
    """Paid is what comes nearer to a worked solution's reward than to that of silence."""
    for kind in ("certificate", "shaped", "answer"):
        plain = CertificateReward(LIS, kind)

        def scaled(completions, plain=plain, **columns):
            return [base + scale * value for value in plain(completions=completions, instance=columns["instance"])]

        audit = checks.verifier(scaled, LIS, n=(8, 12), size=8, guard=False)
        same = checks.verifier(plain, LIS, n=(8, 12), size=8, guard=False)
        assert (audit.verdict, audit.value) == (same.verdict, same.value)
        floor = checks.heuristics(LIS, scaled, n=(8, 16), size=60)
        assert floor.value == pytest.approx(checks.heuristics(LIS, plain, n=(8, 16), size=60).value)
        assert floor.details["solution"] == pytest.approx(base + scale)
        assert (audit.verdict == "fail") == (kind == "answer")
        if kind == "answer":
            assert floor.verdict == "fail" and floor.details["best"] == "patience_tails"


def test_asynchronous_rewards_are_checked_too_without_a_guard():
    async def late(completions, **columns):
        return CertificateReward(LIS)(completions=completions, instance=columns["instance"])

    assert checks.verifier(late, LIS, size=3, guard=False).verdict != "fail"
    assert checks.heuristics(LIS, late, n=(8, 12), size=30).details["best"] == "beam3"
    rows = [{"prompt": f"say {word}", "answer": word} for word in "abcdefgh"]

    async def echo(completions, answer, **columns):
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    assert rows_heuristics(echo, rows, [row["answer"] for row in rows]).value == 1 / 8


def test_the_floor_over_rows_knows_the_scale_of_the_reward():
    rows = [{"prompt": f"say {word}", "answer": word} for word in "aaaaaabc" * 8]

    def pays(completions, answer, **columns):
        return [10.0 * (text == gold) - 5 for text, gold in zip(completions, answer, strict=True)]

    found = rows_heuristics(pays, rows, [row["answer"] for row in rows])
    assert (found.value, found.verdict, found.details["solution"]) == (0.75, "warn", 5.0)


@pytest.mark.parametrize("kind", ["answer", "ids_prefix"])
def test_the_audit_fails_rewards_that_pay_near_misses(kind):
    result = checks.verifier(CertificateReward(LIS, kind), LIS, size=12)
    assert result.verdict == "fail" and result.value > 0.1
    paid = {name for name, row in result.details["kinds"].items() if row["must_pay"] is False and row["paid"]}
    assert "out of range" in paid


def test_the_audit_tells_what_else_is_wrong_with_a_reward():
    mean = checks.verifier(hostile_rewards.stingy, LIS, size=5)
    assert mean.verdict == "fail" and mean.details["false_negative"]["value"] == 1.0
    fragile = checks.verifier(hostile_rewards.fragile, LIS, size=5, item_timeout_s=0.3)
    assert fragile.details["failures"]["exception"] >= 1 and fragile.details["failures"]["timeout"] >= 1
    moody = checks.verifier(hostile_rewards.moody, LIS, size=5, guard=False)
    assert moody.verdict == "fail" and moody.details["unstable"] > 0


def test_the_shortcut_ceiling_lies_above_the_constant_and_falls_under_a_length_shift():
    pytest.importorskip("sklearn")
    result = checks.shortcut_ceiling(LIS, n=(5, 12), train=400, test=150)
    assert result.verdict == "warn" and result.details["constant"] < result.value < 0.95
    assert result.details["length_shift"]["value"] < result.value - 0.2


def naive_dead(row, group, draws=20_000):
    rng = random.Random(0)
    return sum(len(set(rng.sample(row, group))) == 1 for _ in range(draws)) / draws


def test_headroom_is_the_chance_of_a_group_without_variance():
    row = [1] * 3 + [0] * 13
    assert checks.headroom([row], 8).value == pytest.approx(naive_dead(row, 8), abs=0.02)
    assert checks.headroom([[0] * 8] * 60, 8).verdict == "fail"
    alive = checks.headroom([[0, 1] * 8] * 60, 8)
    assert alive.verdict == "pass" and alive.details["solvable"] == 1.0
    with pytest.raises(RlError, match="group_size"):
        checks.headroom([[1, 0]], 8)


def test_contamination_by_overlap_ignores_the_wording_of_the_question():
    def texts(start):
        opening = "Choose the most rows whose values strictly increase."
        return [f"{opening} {' '.join(map(str, range(i, i + 20)))}" for i in start]

    train = texts(range(0, 4000, 40))
    assert checks.contamination(texts(range(10_000, 13_000, 40)), train).verdict == "pass"
    leaked = checks.contamination(train[:20] + texts(range(10_000, 10_200, 40)), train)
    assert leaked.verdict == "fail" and leaked.value == pytest.approx(0.8)


def test_contamination_by_completion_needs_the_fresh_control():
    seen = [f"the {i} th known question has the answer {i * i} exactly" for i in range(40)]
    fresh = [f"the {i} th fresh question has the answer {i * i} exactly" for i in range(40)]
    known = {text[:14]: text for text in seen}

    def parrot(heads):
        return [known.get(head[:14], head + " x")[len(head) :] if "known" in head else "no idea" for head in heads]

    assert checks.contamination(seen, complete=parrot, fresh=fresh).verdict == "fail"
    clean = checks.contamination(seen, complete=lambda heads: ["no idea"] * len(heads), fresh=fresh)
    assert clean.value == 0.0 and clean.verdict != "fail"
    assert checks.contamination(seen).verdict == "not run"


def test_overlap_with_the_training_set_fails_though_nothing_is_completed():
    texts = [" ".join(str(i * 100 + word) for word in range(20)) for i in range(40)]
    fresh = [text.replace("1", "7") for text in texts]
    found = checks.contamination(texts, texts, lambda heads: ["no idea"] * len(heads), fresh)
    assert (found.verdict, found.value, found.details["decided_by"]) == ("fail", 1.0, "overlap")
    clean = checks.contamination(texts, ["something else"] * 40, lambda heads: ["no idea"] * len(heads), fresh)
    assert clean.verdict != "fail" and clean.value == 0.0


def test_the_wording_of_the_question_is_no_overlap_where_the_training_set_is_mostly_other_text():
    wording = "Choose the most rows whose values strictly increase from the first to the last, and state their ids."
    prompts = [f"{wording} {i * 7}" for i in range(40)]
    prose = [" ".join(f"word{i * 50 + k}" for k in range(30)) for i in range(90)]
    assert checks.contamination(prompts, [*prose, *[wording] * 20]).value == 0.0


def naive_overlap(held_out, trained):
    return sum(any(f"\n{prompt}\n" in f"\n{text}\n" for text in trained) for prompt in held_out) / len(held_out)


def test_held_out_lines_are_met_whole_and_in_order_in_a_stream_of_texts():
    rng = random.Random(0)
    for _ in range(30):
        held_out = ["\n".join(rng.choices("abcdef", k=3)) for _ in range(3)]
        trained = ["\n".join(rng.choices("abcdef", k=12)) for _ in range(20)]
        found = held_out_overlap(held_out, iter(trained))
        assert found.value == pytest.approx(naive_overlap(held_out, trained))
        assert found.details["texts"] == 20 and found.verdict == ("fail" if found.value else "pass")
    assert held_out_overlap(["a"], iter(())).verdict == held_out_overlap([], iter("a")).verdict == "not run"


def test_the_triplet_exposes_right_counts_with_wrong_rows():
    instances = LIS.instances(120, (8, 14), split="test")
    policies = checks.scripted_policies(LIS)
    tails = checks.triplet(LIS, instances, policies["patience_tails"](instances), split=["a", "b"] * 60)
    assert tails.verdict == "fail" and tails.value > 0.6
    assert tails.details["all"]["answer"]["value"] == tails.details["all"]["self_agreement"]["value"] == 1.0
    assert set(tails.details["by_split"]) == {"a", "b"} and set(tails.details["by_n"]) <= {str(n) for n in range(8, 15)}
    assert checks.triplet(LIS, instances, policies["perfect"](instances)).verdict == "pass"
    assert checks.triplet(LIS, instances, [None] * 120).verdict == "not run"


def test_heuristic_agreement_names_the_heuristic():
    instances = LIS.instances(100, (10, 16), split="test")
    policies = checks.scripted_policies(LIS)
    beam = checks.heuristic_agreement(LIS, instances, policies["beam3"](instances))
    assert (beam.verdict, beam.details["heuristic"], beam.value) == ("fail", "beam3", 1.0)
    assert checks.heuristic_agreement(LIS, instances, policies["perfect"](instances)).value == -1.0


def test_a_heuristic_that_differs_on_one_instance_hides_no_other():
    task = get_task("lis")
    some = task.instances(60, (10, 14), split="test", discriminating=True)
    beam, rare = task.heuristics["beam2"], some[0]
    task.heuristics = {
        "beam2": beam,
        "rare": lambda one: beam(one) if one.rows == rare.rows else task.solve(one).certificate,
    }
    answers = [beam(one) if i < 48 else task.solve(one).certificate for i, one in enumerate(some)]
    found = checks.heuristic_agreement(task, some, answers)
    assert (found.verdict, found.details["heuristic"], found.n) == ("fail", "beam2", 60)
    assert found.details["disagreement"]["rare"]["heuristic"] == {"value": 1.0, "ci": wilson_interval(1, 1), "n": 1}
    logs = [{"lis/follows/beam2": 0.3 + 0.01 * (i % 2), "lis/follows/rare": i % 2 - 0.1} for i in range(12)]
    followed = checks.followed(logs, "lis")
    assert (followed.verdict, followed.details["heuristic"]) == ("fail", "beam2")


def test_monitored_pays_alike_and_logs_each_sample_by_split_and_size():
    instances = LIS.instances(6, (5, 6), split="test")
    columns = {
        "completions": [LIS.completion(one) for one in instances],
        "instance": [LIS.to_json(one) for one in instances],
        "split": ["iid", "ood"] * 3,
    }
    logged = []
    reward = checks.Monitored(CertificateReward(LIS), LIS)
    assert reward(**columns, log_metric=lambda name, value: logged.append((name, value))) == [1.0] * 6
    assert reward.__name__ == "lis_certificate" and [v for n, v in logged if n == "lis/iid/optimal"] == [1.0] * 3
    assert {n for n, _ in logged if n.startswith("lis/n")} >= {f"lis/n{one.n}/gap" for one in instances}


def test_monitored_logs_whom_the_samples_follow_where_a_heuristic_is_wrong():
    some = LIS.instances(30, (10, 14), split="test")
    policies = checks.scripted_policies(LIS)
    for policy, wanted in (("perfect", -1.0), ("beam2", 1.0), ("constant", 0.0)):
        logged = {}
        texts = policies[policy](some)
        checks.Monitored(CertificateReward(LIS), LIS)(
            completions=texts,
            instance=[LIS.to_json(one) for one in some],
            log_metric=lambda name, value, logged=logged: logged.setdefault(name, []).append(value),
        )
        agreement = checks.heuristic_agreement(LIS, some, texts).details["disagreement"]
        for name in LIS.heuristics:
            wrong = [one for one in some if name not in LIS.fooled(one)]
            values = logged[f"lis/follows/{name}"]
            assert len(values) == len(wrong) and agreement[name]["truth"]["n"] == len(wrong)
            assert sum(values) / len(values) == pytest.approx(
                agreement[name]["heuristic"]["value"] - agreement[name]["truth"]["value"]
            )
        assert sum(logged["lis/follows/beam2"]) == wanted * len(logged["lis/follows/beam2"])


def test_monitored_waits_for_an_asynchronous_reward():
    async def late(completions, **columns):
        return [0.5] * len(completions)

    assert checks.Monitored(late, LIS)(completions=["a", "b"]) == [0.5, 0.5]


def _course(name, values):
    return [{"step": i, name: value} for i, value in enumerate(values)]


def test_a_gap_that_widens_is_told_from_one_that_stays():
    noise = [0.01 * (-1) ** i for i in range(30)]
    assert checks.gap_rise(_course("lis/all/gap", [0.3 + e for e in noise]), "lis/all/gap").verdict == "pass"
    wide = checks.gap_rise(_course("lis/all/gap", [i / 30 + e for i, e in enumerate(noise)]), "lis/all/gap")
    assert wide.verdict == "fail" and wide.value == pytest.approx(20 / 30, abs=0.02)
    assert wide.ci[0] < wide.value < wide.ci[1] and wide.n == 30
    assert checks.gap_rise(_course("lis/all/gap", [0.0, 0.5, 0.1] * 3), "lis/all/gap").verdict == "warn"
    assert checks.gap_rise(_course("lis/all/gap", [0.0] * 9), "lis/all/gap").verdict == "pass"
    assert checks.gap_rise(_course("lis/all/gap", [0.0] * 8), "lis/all/gap").verdict == "not run"


def test_the_heuristic_that_is_followed_at_the_end_is_named():
    noise = [0.01 * (-1) ** i for i in range(12)]
    logs = _course("lis/follows/beam2", [-0.6 + i / 10 + e for i, e in enumerate(noise)])
    for log in logs:
        log["lis/follows/greedy_min"] = -0.4
    found = checks.followed(logs, "lis")
    assert (found.verdict, found.details["heuristic"]) == ("fail", "beam2") and found.value > 0.3
    assert found.details["heuristics"]["beam2"]["start"] < 0
    assert checks.followed(logs[:9], "lis").verdict == "warn"
    assert checks.followed(_course("lis/follows/beam2", noise[:9]), "lis").verdict == "warn"
    assert checks.followed(_course("lis/follows/beam2", [-0.5, -0.4, -0.6] * 3), "lis").verdict == "pass"
    assert checks.followed(logs[:8], "lis").verdict == checks.followed(logs, "activity").verdict == "not run"


def _logs(entropy, **extra):
    return [{"step": i, "entropy": value, "reward": 0.5, **extra} for i, value in enumerate(entropy)]


def test_collapse_sees_a_fall_that_lasts_and_not_a_dip():
    steady = [5.0, 4.5, 5.5, 5.0, 5.0, 4.0, 4.5, 4.0, 4.5]
    assert checks.collapse(_logs(steady)).verdict == "pass"
    assert checks.collapse(_logs([*steady, 0.5, 4.5, 0.5, 4.5])).verdict == "pass"
    assert checks.collapse(_logs([*steady, 1.2, 1.2, 1.2])).verdict == "fail"
    assert checks.collapse(_logs([*steady, 0.5, 0.5, 0.5, 4.5, 4.5, 4.5])).verdict == "warn"
    assert checks.collapse(_logs(steady, frac_reward_zero_std=1.0)).verdict == "warn"
    cut = checks.collapse(_logs(steady, **{"completions/clipped_ratio": 1.0}))
    assert cut.verdict == "warn" and cut.details["cut"] and not cut.details["dead_groups"]
    assert checks.collapse(_logs(steady, **{"completions/clipped_ratio": 0.5})).verdict == "pass"
    assert checks.collapse(_logs(steady[:4])).verdict == "not run"


def test_divergence_sees_the_reward_rise_without_the_strict_measure():
    def logs(strict):
        return [{"reward": i / 10, "strict": value} for i, value in enumerate(strict)]

    assert checks.divergence(logs([i / 20 for i in range(10)]), "strict").verdict == "pass"
    assert checks.divergence(logs([0.5] * 10), "strict").verdict == "warn"
    assert checks.divergence(logs([1 - i / 20 for i in range(10)]), "strict").verdict == "fail"
    assert checks.divergence(logs([0.5] * 3), "strict").verdict == "not run"


def test_few_log_entries_do_not_prove_a_divergence():
    def logs(strict):
        return [{"reward": i / 10, "strict": value} for i, value in enumerate(strict)]

    unsure = checks.divergence(logs([0.6, 0.4, 0.5, 0.3, 0.45, 0.35]), "strict")
    assert unsure.details["trends"]["strict"] < -0.5 and unsure.verdict == "warn" and unsure.ci[0] < -0.5 < unsure.ci[1]
    sure = checks.divergence(logs([1 - i / 40 for i in range(30)]), "strict")
    assert sure.verdict == "fail" and -1 <= sure.ci[0] < sure.value + 1e-2 and sure.ci[1] < 0


def test_rank_correlation_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    for _ in range(20):
        x, y = ([rng.randint(0, 5) for _ in range(12)] for _ in range(2))
        assert _spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_verifier_health_counts_every_failure():
    assert checks.verifier_health({"scored": 2000}).verdict == "pass"
    sick = checks.verifier_health({"scored": 900, "timeout": 60, "crash": 40})
    assert sick.verdict == "fail" and sick.value == 0.1
    assert checks.verifier_health({}).verdict == "not run"


def _control():
    return SimpleNamespace(should_training_stop=False)


def test_a_first_batch_without_any_reward_stops_the_run_plainly():
    state, control = SimpleNamespace(global_step=1), _control()
    alarms = checks.Alarms()
    alarms.on_log(None, state, control, {"loss": 0.0})
    alarms.on_log(None, state, control, {"reward": 0.0, "reward_std": 0.0})
    assert control.should_training_stop and "every reward" in alarms.stopped and alarms.result().verdict == "fail"

    for first in ({"reward": 0.0, "reward_std": 0.4}, {"reward": 0.1, "reward_std": 0.0}):
        alarms, control = checks.Alarms(), _control()
        alarms.on_log(None, state, control, first)
        alarms.on_log(None, state, control, {"reward": 0.0, "reward_std": 0.0})
        assert not control.should_training_stop and alarms.result().verdict == "pass"


def test_a_collapse_warns_once_or_stops(caplog):
    for stop in (False, True):
        alarms, control = checks.Alarms(stop_on_collapse=stop), _control()
        caplog.clear()
        for entry in _logs([1.0] * 8 + [0.1] * 5):
            alarms.on_log(None, SimpleNamespace(global_step=entry["step"]), control, entry)
        assert control.should_training_stop is stop and len(caplog.records) == 1 and "entropy" in caplog.text


@pytest.mark.parametrize("name", ["activity", "activity_weighted", "countdown", "knapsack"])
def test_every_task_of_ours_is_sound_and_its_certificate_reward_pays_no_near_miss(name):
    task, n = get_task(name), (4, 5) if name == "countdown" else (6, 9)
    assert checks.soundness(task, n=n, size=12).details["faults"] == {}
    audit = checks.verifier(CertificateReward(task), task, n=n, size=6)
    assert (audit.verdict, audit.value, audit.details["false_negative"]["value"]) == ("pass", 0.0, 0.0)


def test_a_guarded_reward_and_the_alarms_work_inside_trl(tmp_path):
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from krontune.rl.guard import Guarded

    tokenizer = _letters(PreTrainedTokenizerFast)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=0, eos_token_id=1))
    rows = [{"prompt": "abc", "instance": LIS.to_json(one), "split": "iid"} for one in LIS.instances(8, (5, 6))]
    guarded, alarms = Guarded(CertificateReward(LIS), workers=1), checks.Alarms()
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
        max_completion_length=6, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    reward = checks.Monitored(guarded, LIS)
    trainer = GRPOTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[alarms])
    trainer.train()
    guarded.close()
    assert trainer.state.global_step == 1 and "every reward" in alarms.stopped
    assert guarded.counts["scored"] == 4 and alarms.logs[0]["guard/failed"] == 0.0
    assert alarms.logs[0]["lis/iid/parse_failure"] == 1.0


def _letters(kind):
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return kind(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

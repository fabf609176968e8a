"""Token credit and risk inside TRL: the seam that they hang on, and what they do to a training step."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from trl import GRPOTrainer
from trl.trainer.grpo_trainer import shuffle_sequence_dict, split_tensor_dict

from krontune.adapters import load_base
from krontune.rl import trainer as trainer_module
from krontune.rl.credit import TokenCredit
from krontune.rl.errors import RlError
from krontune.rl.heads import pool, split_heads
from krontune.rl.rhythm import read_rhythm
from krontune.rl.risk import Risk

sys.path.insert(0, str(Path(__file__).parent))
from tiny_grpo import (  # noqa: E402
    ADAPTERS,
    SHORT,
    first_batch,
    gradient_of,
    logged,
    make,
    scripted,
    tiny_model,
    tiny_tokenizer,
    train,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# The seam.


def test_trl_is_the_release_that_the_seam_was_read_in():
    assert trl.__version__.startswith("1.16."), "read GRPOTrainer again, run these tests, then widen the range"


def test_trl_still_has_the_methods_that_are_overridden_with_these_arguments():
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    }
    found = {name: list(inspect.signature(vars(GRPOTrainer)[name]).parameters) for name in expected}
    assert found == expected
    assert "self._generate_and_score_completions(" in inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "self._calculate_rewards(" in inspect.getsource(GRPOTrainer._generate_and_score_completions)


def test_trl_still_hands_over_a_batch_of_these_keys_and_shapes(tmp_path):
    trainer = make(tmp_path, kind=GRPOTrainer)
    batch = first_batch(trainer)
    rows, length = batch["completion_ids"].shape
    assert rows == 8 and batch["advantages"].shape == (8,)
    assert batch["completion_mask"].shape == (8, length) and batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert trainer.eos_token_ids == [2] and trainer._tokenizer.pad_token_id == 0
    assert trainer.temperature == 1.0 and trainer.num_generations == 4
    assert list(trainer._logs["advantages"])[-4:] == batch["advantages"][-4:].tolist()
    assert "reward" in trainer._metrics["train"] and len(trainer.reward_weights) == 1


def test_trl_still_moves_the_rows_of_all_tensors_together():
    ids = torch.arange(8 * 5).view(8, 5)
    batch = {"completion_ids": ids, "advantages": ids.float(), "num_items_in_batch": torch.tensor(40)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 4)
    assert len(parts) == 4 and all(torch.equal(part["advantages"], part["completion_ids"].float()) for part in parts)
    assert torch.equal(torch.cat([part["completion_ids"] for part in parts]).sort(0).values, ids)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_trl_still_takes_advantages_by_token_and_credit_changes_the_gradient(loss_type, tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="off"), loss_type=loss_type)
    batch = first_batch(trainer)
    plain = gradient_of(trainer, batch)
    repeated = batch["advantages"][:, None].repeat(1, batch["completion_ids"].shape[1])
    assert torch.equal(gradient_of(trainer, batch | {"advantages": repeated}), plain)
    repeated[:, ::3] *= 1.5
    changed = gradient_of(trainer, batch | {"advantages": repeated})
    assert (changed - plain).norm() > 0.01 * plain.norm()


def test_a_sequence_ratio_would_still_erase_credit_which_is_why_it_is_refused(tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="off"), importance_sampling_level="sequence", loss_type="grpo")
    batch = first_batch(trainer)
    gamma = torch.ones_like(batch["completion_ids"], dtype=torch.float)
    gamma[:, ::3] = 1.5
    mask = batch["completion_mask"]
    mean = ((gamma * mask).sum(1) / mask.sum(1))[:, None].expand_as(gamma)
    by_token, by_mean = (
        gradient_of(trainer, batch | {"advantages": batch["advantages"][:, None] * g}) for g in (gamma, mean)
    )
    assert (by_token - by_mean).norm() < 1e-5 * by_mean.norm()


# Refusals.


@pytest.mark.parametrize("options", [{"importance_sampling_level": "sequence"}, {"loss_type": "luspo"}])
def test_settings_that_erase_credit_are_refused(options, tmp_path):
    with pytest.raises(RlError, match="erased"):
        make(tmp_path, **options)


def test_an_entropy_quantile_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="top_entropy_quantile=0.2"):
        make(tmp_path, top_entropy_quantile=0.2)


def test_attention_that_cannot_be_read_is_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(RlError, match="layers must be"):
        make(tmp_path, TokenCredit(layers=(7,)))


def test_risk_is_refused_where_rewards_are_normalised_apart_or_bundles_do_not_fit(tmp_path):
    with pytest.raises(RlError, match="sum_then_normalize"):
        make(tmp_path, risk=Risk(), multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(RlError, match="bundles of 2"):
        make(tmp_path, risk=Risk(bundle=2))
    with pytest.raises(RlError, match="tail of one"):
        make(tmp_path, risk=Risk(alpha=0.25))


def test_settings_that_are_none_are_refused_by_name(tmp_path):
    with pytest.raises(RlError, match="credit must be a TokenCredit"):
        make(tmp_path, {"strategy": "coupled"})
    with pytest.raises(RlError, match="risk must be a Risk"):
        make(tmp_path, risk=0.5)


# What they do.


def test_without_credit_and_risk_the_trainer_is_trls(tmp_path):
    ours, theirs = make(tmp_path, TokenCredit(strategy="off")), make(tmp_path, kind=GRPOTrainer)
    train(ours), train(theirs)
    assert torch.equal(weights(ours), weights(theirs))
    assert not logged(ours, "credit/gamma_mean")


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_head_sees_only_completions(share_prompts, tmp_path, projected):
    trainer = make(tmp_path, TokenCredit(strategy="off"), share_prompts=share_prompts)
    batch = first_batch(trainer)
    projected.clear()
    gradient_of(trainer, batch)
    assert projected == [int(batch["completion_mask"].sum())]


def test_advantages_become_gamma_times_trls(tmp_path):
    plain = first_batch(make(tmp_path, TokenCredit(strategy="off")))
    batch = first_batch(make(tmp_path, TokenCredit(strategy="anchor", horizon=(2, 8), credit_truncated=True)))
    assert torch.equal(plain["completion_ids"], batch["completion_ids"])
    assert batch["advantages"].shape == batch["completion_ids"].shape
    gamma = batch["advantages"] / plain["advantages"][:, None]
    gamma = gamma[plain["advantages"] != 0]
    assert set(gamma.unique().round(decimals=4).tolist()) == {1.0, 1.5}


def test_truncated_completions_keep_gamma_one_unless_asked(tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="random", credit_truncated=False))
    batch = first_batch(trainer)
    cut = ~(batch["completion_ids"] == 2).any(1)
    assert cut.any()
    assert (batch["advantages"][cut] == batch["advantages"][cut][:, :1]).all()


def ending_in(token):
    def rollout(prompts, trainer):
        said = scripted(prompts, trainer)
        said["completion_ids"] = [[*ids[:-1], token] for ids in said["completion_ids"]]
        return said

    return rollout


@pytest.mark.parametrize(("last", "cut"), [(2, False), (0, False), (50, True)])
def test_what_counts_as_cut_is_what_trl_counts(last, cut, tmp_path):
    # Generation that a stop string ended is filled up with padding, which TRL takes for an end, too.
    trainer = make(tmp_path, TokenCredit(strategy="random"), rollout_func=ending_in(last))
    first_batch(trainer)
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [float(cut)]
    assert (trainer._metrics["train"]["credit/share"] == [0.0]) == cut


def only_some_groups(completions, **_):
    """Rewards of two groups of four: in the second, all alike."""
    return [len(text) / 100 if at < 4 else 1.0 for at, text in enumerate(completions)]


@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
def test_only_responses_that_can_be_credited_are_read_and_gamma_is_the_same(sign, tmp_path, monkeypatch):
    # One group for all heads, since the split is that of the responses that are read.
    credit = TokenCredit(
        horizon=(2, 8), window=4, credit_truncated=True, sign=sign, head_quantile=1.0, normalize="mean"
    )
    rows = []

    def counting(model, ids, *rest, **options):
        rows.append(len(ids))
        return read_rhythm(model, ids, *rest, **options)

    def batch(every):
        rows.clear()
        options = {"reward": only_some_groups, "rollout_func": scripted, "per_device_train_batch_size": 8}
        trainer = make(tmp_path, credit, **options)
        if every:
            monkeypatch.setattr(trainer_module, "credited", lambda advantages, sign: torch.ones_like(advantages).bool())
        return first_batch(trainer)["advantages"], sum(rows)

    monkeypatch.setattr(trainer_module, "read_rhythm", counting)
    some, few = batch(every=False)
    whole, all_rows = batch(every=True)
    plain = first_batch(make(tmp_path, TokenCredit(strategy="off"), reward=only_some_groups, rollout_func=scripted))
    wanted = {"both": plain["advantages"] != 0, "positive": plain["advantages"] > 0}
    assert few - 1 == wanted.get(sign, plain["advantages"] < 0).sum() < 8  # one row is read when the trainer is made
    assert all_rows - 1 == 8
    expected = whole
    if sign != "both":  # `credited` also tells which advantages gamma multiplies
        expected = whole.where(wanted.get(sign, plain["advantages"] < 0)[:, None], plain["advantages"][:, None])
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_with_nothing_to_credit_keeps_its_advantages_and_the_run_goes_on(tmp_path):
    trainer = make(tmp_path, reward=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert logged(trainer, "credit/share") == [0.0, 0.0] and logged(trainer, "credit/gamma_mean") == [1.0, 1.0]
    assert trainer._batches == 2


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_pass_reads_the_same_in_chunks_of_any_size(rows, tmp_path):
    trainer = make(tmp_path, SHORT, rollout_func=scripted, per_device_train_batch_size=8)
    batch = first_batch(make(tmp_path, TokenCredit(strategy="off"), rollout_func=scripted))
    response = batch["completion_mask"] * batch["tool_mask"]
    response[3] = 0
    trainer.args.per_device_train_batch_size = rows
    waad, fai = trainer._waad_and_fai(batch, response)
    # The obvious way: every row, in full, in one forward.
    ids, attended = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), response], 1)
    rhythms = read_rhythm(trainer.model, ids, attended, counted, window=4, horizon=(2, 8))
    spans = {layer: (rhythm.span * counted.sum(1)[:, None]).sum(0) / counted.sum() for layer, rhythm in rhythms.items()}
    start = batch["prompt_ids"].shape[1]
    for got, expected in zip((waad, fai), pool(rhythms, split_heads(spans)), strict=True):
        expected = expected[:, start:] * response.any(1)[:, None]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_between_the_batches_that_measure_the_split_only_settled_heads_are_read(tmp_path, monkeypatch):
    asked = []

    def noting(*arguments, **options):
        asked.append(options.get("heads"))
        return read_rhythm(*arguments, **options)

    trainer = make(tmp_path, TokenCredit(horizon=(2, 8), credit_truncated=True, head_refresh=3))
    monkeypatch.setattr(trainer_module, "read_rhythm", noting)
    splits = []
    for _ in range(4):
        first_batch(trainer)
        splits.append(trainer.head_split.state_dict()["_heads"])
    chunks = len(asked) // 4  # of four rows
    assert asked[::chunks] == [None, splits[0], splits[0], None]
    assert sum(len(local) for local, _ in splits[0].values()) == 2  # of 8 heads, 30 %


def test_evaluation_keeps_trls_advantages(tmp_path):
    trainer = make(tmp_path)
    trainer.model.eval()
    rows = [{"prompt": "say a"}] * 8
    assert trainer._generate_and_score_completions(rows)["advantages"].shape == (8,)


@pytest.mark.parametrize("strategy", ["coupled", "random", "entropy", "uniform"])
def test_a_run_logs_what_was_credited(strategy, tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy, horizon=(2, 8), credit_truncated=True, cosine_every=1))
    trainer.train()
    assert 1 < logged(trainer, "credit/gamma_mean")[0] <= 1.25
    assert 0 < logged(trainer, "credit/share")[0] <= 1
    cosines = logged(trainer, "credit/cosine")
    assert cosines and all(0.5 < c <= 1 + 1e-9 for c in cosines)
    assert bool(logged(trainer, "credit/head_turnover")) == bool(logged(trainer, "credit/fai_share"))
    assert bool(logged(trainer, "credit/fai_share")) == (strategy == "coupled")


def test_log_probabilities_and_entropies_are_those_of_each_token_at_the_sampling_temperature(tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="entropy"), rollout_func=scripted, temperature=0.7)
    batch = first_batch(trainer)
    row = {name: values[:2] for name, values in batch.items() if name != "num_items_in_batch"}
    log_probs, entropy = trainer._log_probs_and_entropy(row)
    assert log_probs.requires_grad and not entropy.requires_grad and trainer.model.training
    for at in range(2):
        prompt = row["prompt_ids"][at][row["prompt_mask"][at] == 1]
        said = row["completion_ids"][at][row["completion_mask"][at] == 1]
        every = (trainer.model(torch.cat([prompt, said])[None]).logits[0] / 0.7).log_softmax(-1)
        before = every[len(prompt) - 1 : -1]  # what is said of a token stands a place before it
        expected = before.gather(1, said[:, None])[:, 0], -(before.exp() * before).sum(1)
        for got, wanted in zip((log_probs, entropy), expected, strict=True):
            torch.testing.assert_close(got[at, : len(said)], wanted, rtol=0, atol=1e-4)


def test_the_strategy_entropy_takes_the_tokens_of_which_the_policy_was_least_sure(tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="entropy"), rollout_func=scripted)
    batch = first_batch(trainer)
    at = int(batch["advantages"].abs().amax(1).argmax())
    row = {name: values[at : at + 1] for name, values in batch.items() if name != "num_items_in_batch"}
    own, size = (row["completion_mask"] * row["tool_mask"])[0] == 1, row["advantages"][0].abs()
    entropy = trainer._log_probs_and_entropy(row)[1][0]
    chosen = own & (size > size.min() * 1.2)
    assert chosen.any() and entropy[chosen].min() >= entropy[own & ~chosen].max()


def test_the_cosine_is_one_for_uniform_credit_and_leaves_training_alone(tmp_path):
    uniform = TokenCredit(strategy="uniform", credit_truncated=True)
    measured = make(tmp_path, TokenCredit(strategy="uniform", credit_truncated=True, cosine_every=1))
    untouched = make(tmp_path, uniform)
    train(measured), train(untouched)
    assert logged(measured, "credit/cosine")[0] == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights(measured), weights(untouched))


@pytest.mark.parametrize("adapter", ["lora", "moka"])
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.04},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "mask_truncated_completions": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
)
def test_adapters_train_with_credit_under_the_settings_that_change_the_loop(adapter, options, tmp_path):
    trainer = make(tmp_path, peft_config=ADAPTERS[adapter], **options)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert trainer._batches == 2 // options.get("num_iterations", 1)


@pytest.mark.parametrize("adapter", ["lora", "moka"])
def test_adapters_on_a_four_bit_base_train_with_credit(adapter, tiny_folder, tmp_path):
    model, _ = load_base(tiny_folder, "nf4", device="cpu")
    trainer = make(tmp_path, model=model, peft_config=ADAPTERS[adapter], bf16=True)
    if adapter == "moka":  # TRL casts what is trained to bfloat16, and DDP would take it so
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
    assert logged(trainer, "credit/share")[0] > 0


def test_tool_output_is_never_credited(tmp_path):
    credit = TokenCredit("preplan", window=4)
    averse = first_batch(make(tmp_path, TokenCredit(strategy="off"), rollout_func=scripted))
    batch = first_batch(make(tmp_path, credit, rollout_func=scripted))
    gamma = (batch["advantages"] / averse["advantages"][:, None])[averse["advantages"] != 0]
    tool = (batch["tool_mask"] == 0)[averse["advantages"] != 0]
    assert tool[:, 5:9].all() and (gamma[tool] == 1).all() and gamma.max() == pytest.approx(1.5)
    assert (gamma[:, 4] == 1).all()  # the last token of a turn opens nothing


def run_of_this_process(folder, per_device):
    """One run on the scripted completions, from the command line too: see the next test."""
    credit = TokenCredit(horizon=(2, 8), window=4, head_refresh=2)
    options = {"per_device_train_batch_size": per_device, "max_steps": 3, "rollout_func": scripted, "risk": Risk()}
    options |= {"num_generations": 8}  # one group, which two processes share
    trainer = make(folder, credit, peft_config=ADAPTERS["lora"], ddp_find_unused_parameters=False, **options)
    trainer.train()
    lines = [
        {k: v for k, v in line.items() if k.startswith(("credit/", "risk/"))} for line in trainer.state.log_history
    ]
    heads = trainer.head_split.state_dict()["_heads"]
    rank = trainer.accelerator.process_index
    torch.save({"weights": weights(trainer), "heads": heads, "log": lines}, Path(folder) / f"{rank}.pt")


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "two").mkdir(), (tmp_path / "one").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two"), "4"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run_of_this_process(tmp_path / "one", 8)
    first, second, one = (torch.load(tmp_path / path) for path in ("two/0.pt", "two/1.pt", "one/0.pt"))
    assert torch.equal(first["weights"], second["weights"]) and first["heads"] == second["heads"] == one["heads"]
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-4)  # of moves of 1e-2
    for line, same in zip(first["log"], one["log"], strict=True):
        assert line == pytest.approx(same, abs=1e-6)
    assert len(one["log"]) == 4 and one["log"][0]["credit/share"] > 0


def test_risk_replaces_the_advantages_and_the_table_shows_it(tmp_path):
    trainer = make(tmp_path, TokenCredit(strategy="off"), risk=Risk(weight=0.0), gradient_accumulation_steps=2)
    batch = first_batch(trainer)
    rewards = torch.tensor(trainer._logs["rewards"]["letters"])
    centred = (rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)).view(-1)
    torch.testing.assert_close(batch["advantages"], centred)
    torch.testing.assert_close(torch.tensor(trainer._logs["advantages"]), centred)
    assert trainer._metrics["train"]["risk/zero_groups"] == [0.0]


def test_a_graded_reward_may_once_give_zeros_and_ones_alone_and_the_run_goes_on(tmp_path):
    def of_the_next(rewards):
        return lambda completions, **_: next(rewards)

    options = {"risk": Risk(weight=1.0, alpha=0.5), "per_device_train_batch_size": 8}
    graded, binary = [0.0, 0.5, 1.0, 1.0] * 2, [0.0, 0.0, 1.0, 1.0] * 2
    trainer = make(tmp_path, TokenCredit(strategy="off"), reward=of_the_next(iter([graded, binary])), **options)
    assert first_batch(trainer)["advantages"][0] < 0
    assert (first_batch(trainer)["advantages"] == 0).all()
    trainer = make(tmp_path, TokenCredit(strategy="off"), reward=of_the_next(iter([binary])), **options)
    with pytest.raises(RlError, match="hard prompts would starve"):
        first_batch(trainer)


def test_risk_at_the_mean_trains_as_trl_does_without_scaling(tmp_path):
    ours = make(tmp_path, TokenCredit(strategy="off"), risk=Risk(alpha=1.0))
    theirs = make(tmp_path, kind=GRPOTrainer, scale_rewards="none")
    train(ours), train(theirs)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)


def test_risk_and_credit_compose(tmp_path):
    averse = first_batch(
        make(tmp_path, TokenCredit(strategy="off"), risk=Risk(bundle=2), per_device_train_batch_size=8)
    )
    both = first_batch(make(tmp_path, risk=Risk(bundle=2), per_device_train_batch_size=8))
    ratio = both["advantages"] / averse["advantages"][:, None]
    ratio = ratio[averse["advantages"] != 0]
    assert ratio.min() == pytest.approx(1) and ratio.max() > 1.2


def test_a_run_that_is_continued_ends_like_an_unbroken_one(tmp_path):
    credit = TokenCredit(horizon=(2, 8), credit_truncated=True, head_refresh=2)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    options |= {"risk": Risk(weight=0.9)}
    whole = make(tmp_path / "whole", credit, peft_config=ADAPTERS["lora"], **options)
    whole.train()
    continued = make(tmp_path / "new", credit, peft_config=ADAPTERS["lora"], **options)
    continued.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert continued._batches == whole._batches == 4 and continued._graded
    assert continued.head_split.state_dict()["_heads"] == whole.head_split.state_dict()["_heads"]
    torch.testing.assert_close(weights(continued), weights(whole))


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"num_iterations": 3}, 4),  # in the middle of what was sampled
        pytest.param(
            {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1},
            3,
            marks=pytest.mark.slow,
        ),
        ({}, 5),  # in the second epoch, whose order is another
        pytest.param({}, 4, marks=pytest.mark.slow),  # between two epochs
    ],
)
def test_a_run_that_is_continued_anywhere_ends_with_the_same_bits(tmp_path, options, at):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1} | options
    whole = make(tmp_path / "whole", peft_config=ADAPTERS["lora"], **options)
    whole.train()
    continued = make(tmp_path / "new", peft_config=ADAPTERS["lora"], **options)
    continued.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert torch.equal(weights(continued), weights(whole))
    numbers = [
        [{key: value for key, value in line.items() if "time" not in key} for line in trainer.state.log_history[at:-1]]
        for trainer in (whole, continued)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 6 - at


if __name__ == "__main__":
    run_of_this_process(sys.argv[1], int(sys.argv[2]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_with_shared_prompts_is_training_without(tmp_path, accumulation):
    trained, logs = [], []
    for shared in (False, True):
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = make(
            tmp_path / str(shared),
            credit=SHORT,
            peft_config=ADAPTERS["moka"],
            share_prompts=shared,
            temperature=0.7,
            **options,
        )
        sizes = []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda _, args, given, to=sizes: to.append(given["input_ids"].numel()), with_kwargs=True
        )
        train(trainer)
        trained.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        lines = [log for log in trainer.state.log_history if "reward" in log]
        logs.append([(line["reward"], line["entropy"], sum(sizes)) for line in lines])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for (reward, entropy, plain), (same_reward, same_entropy, packed) in zip(*logs, strict=True):
        assert same_reward == reward and same_entropy == pytest.approx(entropy, rel=1e-4)
        assert accumulation > 1 or packed < plain  # accumulation parts the groups

"""MoKA under TRL's trainers, which cast trainable weights over a quantised base to bfloat16."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, load_base

pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = {
    "use_cpu": True,
    "bf16": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "seed": 3,
}


def gates(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("moka_gate.default.logits")}


def factors(model):
    return {name: p for name, p in model.named_parameters() if ".moka_A." in name or ".moka_B." in name}


def snapshot(parameters):
    return {name: p.detach().float().clone() for name, p in parameters.items()}


def assert_trained(model, gates_before, factors_before):
    assert gates_before and factors_before
    for name, gate in gates(model).items():
        assert gate.dtype == torch.float32
        assert not torch.equal(gate, gates_before[name]), f"{name} has not moved"
    for name, factor in factors(model).items():
        if ".default." in name:
            assert factor.dtype == torch.float32
            assert not torch.equal(factor.float(), factors_before[name]), f"{name} has not moved"


def test_trl_still_casts_to_bfloat16_so_these_tests_show_something(tiny_folder, tmp_path):
    trainer = sft_trainer(tiny_folder, tmp_path, max_steps=1)
    assert {p.dtype for p in [*factors(trainer.model).values(), *gates(trainer.model).values()]} == {torch.bfloat16}


def reward_of_letters(completions, **_):
    return [sum(character in "aeiou" for character in text) for text in completions]


def reward_of_place(completions, **_):
    """Never equal within a group, so that every step has a gradient."""
    return [float(place) for place in range(len(completions))]


def sft_trainer(folder, out, **options):
    model, tokenizer = load_base(folder, "nf4", device="cpu")
    rows = Dataset.from_dict({"text": ["the quick brown fox", "jumps over the lazy dog"] * 4})
    args = SFTConfig(output_dir=str(out), per_device_train_batch_size=4, max_length=32, **(COMMON | options))
    config = MokaConfig(target_modules="all-linear", r=4)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=config)


def grpo_trainer(folder, out, model=None, reward=reward_of_letters, **options):
    base, tokenizer = load_base(folder, "nf4", device="cpu")
    rows = Dataset.from_dict({"prompt": ["say a", "say b", "say c", "say d"]})
    args = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        **(COMMON | options),
    )
    return GRPOTrainer(
        model=model or base,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
        peft_config=None if model else MokaConfig(target_modules="all-linear", r=4, init_weights=False),
    )


def test_sft_trains_factors_and_keeps_the_gates_in_float32(tiny_folder, tmp_path):
    trainer = sft_trainer(tiny_folder, tmp_path, max_steps=3)
    before = snapshot(gates(trainer.model)), snapshot(factors(trainer.model))
    trainer.train()
    assert_trained(trainer.model, *before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_sft_with_an_evaluation_between_the_steps_still_trains_every_layer(tiny_folder, tmp_path):
    trainer = sft_trainer(tiny_folder, tmp_path, max_steps=3, gradient_checkpointing=True)
    trainer.evaluate(trainer.train_dataset)
    before = snapshot(gates(trainer.model)), snapshot(factors(trainer.model))
    trainer.train()
    assert_trained(trainer.model, *before)


def test_an_adapter_saved_by_a_trainer_reads_back_with_float32_gates(tiny_folder, tmp_path, tokens):
    trainer = sft_trainer(tiny_folder, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load_base(tiny_folder, "nf4", device="cpu")[0], tmp_path / "adapter")
    for name, gate in gates(again).items():
        assert gate.dtype == torch.float32
        assert torch.equal(gate, gates(trainer.model)[name])


def test_grpo_trains_factors_and_keeps_the_gates_in_float32(tiny_folder, tmp_path):
    trainer = grpo_trainer(tiny_folder, tmp_path, max_steps=2)
    before = snapshot(gates(trainer.model)), snapshot(factors(trainer.model))
    trainer.train()
    assert_trained(trainer.model, *before)


def test_the_reference_adapter_of_grpo_is_a_copy_that_stays(tiny_folder, tmp_path):
    base, _ = load_base(tiny_folder, "nf4", device="cpu")
    model = get_peft_model(base, MokaConfig(target_modules="all-linear", r=4, init_weights=False))
    for gate in gates(model).values():
        torch.nn.init.normal_(gate.data)
    for parameter in (gates(model) | factors(model)).values():
        parameter.data = parameter.data.bfloat16().float()  # TRL rounds the policy to bfloat16, and not its reference
    start = snapshot(gates(model) | factors(model))
    trainer = grpo_trainer(tiny_folder, tmp_path, model, reward_of_place, beta=0.1, max_steps=2)
    trainer.train()
    reference = {n: p for n, p in trainer.model.named_parameters() if ".moka_" in n and ".ref." in n}
    assert len(reference) == len(start)
    for name, parameter in reference.items():
        assert torch.equal(parameter.float(), start[name.replace(".ref.", ".default.")])
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == 0.0 and divergence[1] > 1e-3


def names_for_inference(model):
    """(name, weight) as TRL's `VLLMGeneration.sync_weights` hands them over between merging and unmerging."""
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name and "original_module" not in name:
            yield name.replace("modules_to_save.default.", ""), parameter.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_sync_hands_over_the_merged_model_and_leaves_the_training_as_it_was(
    tiny_llama, tokens, shake, dtype
):
    model = get_peft_model(
        tiny_llama().to(dtype), MokaConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    )
    shake(model, scale=0.1)
    with torch.no_grad():
        expected = model(tokens).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model.merge_adapter()
        served = {name: value.clone() for name, value in names_for_inference(model)}
        model.unmerge_adapter()
    plain = tiny_llama().to(dtype)
    plain.load_state_dict(served)
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=tolerance, atol=tolerance)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_dpo_measures_against_the_base_and_trains_the_adapter(tiny_folder, tmp_path):
    from trl import DPOConfig, DPOTrainer

    base, tokenizer = load_base(tiny_folder, "nf4", device="cpu")
    rows = Dataset.from_dict({"prompt": ["say a"] * 4, "chosen": [" aaa"] * 4, "rejected": [" bbb"] * 4})
    options = {"per_device_train_batch_size": 4, "max_steps": 2} | COMMON
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=MokaConfig(target_modules="all-linear", r=4, init_weights=False),
    )
    before = snapshot(gates(trainer.model)), snapshot(factors(trainer.model))
    trainer.train()
    assert_trained(trainer.model, *before)

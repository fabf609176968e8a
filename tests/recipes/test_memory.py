"""The memory estimate beside the tensors of a real forward pass, and for large models from their numbers alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.adapters.base import bitsandbytes_config
from krontune.recipes.memory import (
    FOUR_BITS,
    TILE_TOKENS,
    TILE_WORDS,
    Memory,
    Widths,
    adapter_bytes,
    generated_at_once,
    layer_bytes,
    logit_bytes,
    rl_memory,
    rollout_bytes,
    sft_memory,
    training_bytes,
    weight_bytes,
)
from krontune.recipes.schema import Rl, Sft
from krontune.recipes.schema_model import Adapter, BaseModelSection
from krontune.recipes.targets import match, skeleton
from krontune.recipes.training import moka_config

SMALL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
EIGHT_B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SEVENTY_B = EIGHT_B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}


def naive_saved(layers: int, adapter: Adapter, lines: int, length: int, attention: str) -> int:
    """Bytes of all tensors that autograd keeps of a real forward pass, each storage once, parameters not."""
    config = LlamaConfig(**SMALL, num_hidden_layers=layers)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    tuned = get_peft_model(model.requires_grad_(False), moka_config(adapter)).train()
    tuned.enable_input_require_grads()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*tuned.parameters(), *tuned.buffers()]}
    kept = {}  # holds the tensors, lest an address is used again

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(0, 99, (lines, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tuned.base_model.model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize(("lines", "length"), [(1, 65), (3, 130)])
def test_a_layer_keeps_what_autograd_is_seen_to_keep(attention, options, lines, length):
    adapter = Adapter(r=4, **options)
    seen = naive_saved(3, adapter, lines, length, attention) - naive_saved(2, adapter, lines, length, attention)
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    targets = match(skeleton(config), adapter)
    assert layer_bytes(Widths.of(config), targets, lines, length, attention) == pytest.approx(seen, rel=0.03)


def test_weights_in_sixteen_bits_are_those_of_the_model_with_tied_ones_once():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=2)).bfloat16()
    assert weight_bytes(model, None) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_are_those_that_bitsandbytes_holds(tmp_path, quantization):
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    options = bitsandbytes_config(quantization, torch.bfloat16)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=options, dtype=torch.bfloat16)
    held = {p.data_ptr(): p.numel() * p.element_size() for p in loaded.parameters()}
    scales = 0
    for module in loaded.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            scales += state.absmax.nbytes + state.state2.absmax.nbytes
        elif quantization == "int8" and isinstance(module, torch.nn.Linear) and module is not loaded.lm_head:
            scales += module.weight.SCB.nbytes
    # Small layers do not fill their last block of 256 scales.
    assert weight_bytes(skeleton(config), quantization) == pytest.approx(sum(held.values()) + scales, rel=0.01)


@pytest.mark.parametrize(("numbers", "parameters"), [(EIGHT_B, 8_030_261_248), (SEVENTY_B, 70_553_706_496)])
def test_large_models_are_estimated_from_their_numbers_alone(numbers, parameters):
    config = LlamaConfig(**numbers)
    model = skeleton(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    words = 2 * config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    linear = parameters - words - norms
    assert weight_bytes(model, "nf4") == pytest.approx(linear * FOUR_BITS + 2 * (words + norms), rel=1e-6)
    adapter = Adapter(target_modules=["q_proj", "v_proj"])
    targets = match(model, adapter)
    base = BaseModelSection(model="large")
    stage = Sft(stage="sft", adapter=adapter, trainer={"per_device_train_batch_size": 1})
    found = sft_memory(skeleton(config), base, stage, targets, 2048, triton=True)
    # Checkpoints of every layer, and one layer computed again, dominate; the output layer is one tile.
    checkpoints = 2048 * 2 * config.hidden_size * config.num_hidden_layers
    assert checkpoints < found.activations < 4 * checkpoints
    assert found.logits == 2048 * 2 * TILE_WORDS
    assert found.adapter == found.gradients == found.optimizer // 2 == 4 * targets.trainable
    low, high = (6.5e9, 8.5e9) if parameters < 1e10 else (40e9, 48e9)
    assert low < found.peak < high


def test_without_checkpointing_every_layer_keeps_its_own():
    config = LlamaConfig(**EIGHT_B)
    targets = match(skeleton(config), Adapter())
    kept, _ = training_bytes(config, targets, 1, 2048, checkpointing=False)
    again, _ = training_bytes(config, targets, 1, 2048, checkpointing=True)
    assert kept > 32 * layer_bytes(Widths.of(config), targets, 1, 2048, "sdpa") > 10 * again


def test_logits_are_never_whole():
    assert logit_bytes(100, 128256, triton=True) == 100 * 2 * TILE_WORDS
    assert logit_bytes(10 * TILE_TOKENS, 128256, triton=True) == TILE_TOKENS * 2 * TILE_WORDS
    assert logit_bytes(100, 1000, triton=False) == 100 * (2 * TILE_WORDS + 29 * 1000)


def test_the_optimizer_decides_how_much_it_keeps():
    assert adapter_bytes(10) == (40, 40, 80)
    assert adapter_bytes(10, "adamw_bnb_8bit")[2] == adapter_bytes(10, "paged_adamw_8bit")[2] == 20


def test_training_and_rollouts_take_turns():
    memory = Memory(weights=100, adapter=1, gradients=1, optimizer=2, activations=50, logits=10, rollouts=40)
    assert memory.peak == 164 and memory.beyond_weights == 64
    assert Memory(100, 1, 1, 2, 50, 10, rollouts=70).peak == 174
    assert memory.parts()["peak"] == 164 and memory.parts()["weights"] == 100


def test_the_cache_of_a_generation_holds_keys_and_values_of_every_layer():
    config = LlamaConfig(**EIGHT_B)
    cache = 2 * 2 * 1024 * 16 * (100 + 200) * 33  # keys and values, bfloat16, 8 heads of 128, one layer twice
    step = 16 * 128256 * 14
    reading = 16 * 100 * (8 * 14336 + 16 * 4096)
    assert rollout_bytes(config, 16, 100, 200) == cache + max(step, reading)
    assert rollout_bytes(config, 16, 100, 200, dense=10) == 20 + cache + max(step, reading)


def test_a_smaller_cache_counts_its_bits_its_scales_and_what_it_leaves_in_16_bits():
    config, layer, newest = LlamaConfig(**EIGHT_B), 2 * 2 * 1024 * 16 * 300, 2 * 2 * 1024 * 16 * 128
    rest = rollout_bytes(config, 16, 100, 200) - 33 * layer
    expected = {
        "offloaded": 3 * layer,
        "fp8": 16 * layer + layer,
        "int4": 32 * (layer * (4 + 32 / 64) / 16 + newest) + layer,  # a scale and a zero point for 64 numbers
        "int2": 32 * (layer * (2 + 32 / 64) / 16 + newest) + layer,
    }
    assert {cache: rollout_bytes(config, 16, 100, 200, cache=cache) - rest for cache in expected} == expected


def test_an_rl_stage_counts_its_whole_batch_of_completions_and_shared_prompts_once():
    config, base = LlamaConfig(**EIGHT_B), BaseModelSection(model="large")
    model, targets = skeleton(config), match(skeleton(config), Adapter())
    trainer = {
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 100,
        "gradient_accumulation_steps": 4,
    }
    task = {"name": "lis", "n": [3, 5]}
    stage = Rl.model_validate({"stage": "rl", "task": task, "adapter": {}, "trainer": trainer})
    assert generated_at_once(stage) == 32
    apart = rl_memory(model, base, stage, targets, 400, triton=True)
    assert apart.rollouts == rollout_bytes(config, 32, 400, 100)
    assert apart.logits == 800 * 2 * TILE_WORDS  # of the prompts no log-probability is asked for
    slow = rl_memory(model, base, stage, targets, 400, triton=False)
    assert slow.logits == logit_bytes(800, config.vocab_size, triton=False)  # `score_labelled_only`
    shared = rl_memory(model, base, stage.model_copy(update={"share_prompts": True}), targets, 400, triton=True)
    assert shared.activations < 0.4 * apart.activations  # 1200 positions in the place of 4000

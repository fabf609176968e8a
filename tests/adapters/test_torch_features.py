"""What torch wraps around a model: compile, autocast, activation checkpointing, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from krontune.adapters import AdapterError, MokaConfig, load_base


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def gradients(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted(base, shake, **options):
    return shake(get_peft_model(base, MokaConfig(**({"target_modules": "all-linear", "r": 4} | options))), scale=0.1)


def assert_same_gradients(found, expected, **tolerance):
    assert found.keys() == expected.keys() and any(".moka_gate." in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **tolerance)


SLOW = [{"gate": "none"}, {"identity": "A"}, {"r": 7, "n_shapes": 3}]


@pytest.mark.parametrize("options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in SLOW)])
def test_one_graph_without_breaks_gives_the_same_values_and_gradients(tiny_llama, tokens, shake, options):
    options = {"target_modules": ["q_proj", "down_proj"]} | options
    model = adapted(tiny_llama(num_hidden_layers=1), shake, **options).train()
    expected = gradients(model, tokens)
    values = logits(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, tokens), values, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    torch.nn.functional.cross_entropy(compiled(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_quantised_base_compiles(tiny_folder, tokens, shake):
    base, _ = load_base(tiny_folder, "nf4", dtype=torch.float32, device="cpu")
    model = adapted(base, shake).train()
    expected = gradients(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_gradients(
        gradients(compiled, tokens), {f"_orig_mod.{n}": g for n, g in expected.items()}, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_both_kinds_of_checkpointing_give_the_same_gradients(tiny_folder, tokens, shake, quantization, use_reentrant):
    base, _ = load_base(tiny_folder, quantization, dtype=torch.float32, device="cpu")
    model = adapted(base, shake, dropout=0.2).train()
    torch.manual_seed(0)
    expected = gradients(model, tokens)
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)
    torch.manual_seed(0)
    assert_same_gradients(gradients(model, tokens), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_training_under_autocast_is_near_float32_and_keeps_float32_parameters(tiny_folder, tokens, shake, quantization):
    base, _ = load_base(tiny_folder, quantization, dtype=torch.float32, device="cpu")
    model = adapted(base, shake).train()
    expected = gradients(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, tokens)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        near = torch.nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert near > 0.97, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"], r".*(q_proj|lm_head)"])
def test_the_output_layer_is_refused_by_name_and_the_model_left_as_it_was(tiny_llama, tokens, tied, targets):
    model = tiny_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(tokens).logits
    with pytest.raises(AdapterError, match=r"'lm_head' is the output layer.*modules_to_save=\['lm_head'\]") as caught:
        get_peft_model(model, MokaConfig(target_modules=targets))
    assert ("shares its weight with the input embedding" in str(caught.value)) == tied
    assert type(model.lm_head) is torch.nn.Linear and torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    ],
)
def test_what_the_refusal_of_the_output_layer_advises_works(tiny_llama, tokens, tied, options):
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), MokaConfig(**options))
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("q_proj.moka_B" in name for name in trained)
    assert any("lm_head" in name for name in trained) == ("modules_to_save" in options)
    assert not any("lm_head" in name and "moka_" in name for name, _ in model.named_parameters())


def test_a_second_adapter_on_the_output_layer_is_refused_too(tiny, tokens):
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        model.add_adapter("other", MokaConfig(target_modules=["q_proj", "lm_head"]))


def output_of(script, *arguments, processes=2):
    """What a script beside this file prints, run alone or in several gloo processes."""
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *several, str(Path(__file__).parent / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    """Under DDP and FSDP2 each process sees half of the batch; gradients, steps and gathered state are those of one."""
    found = output_of("two_processes.py")
    said = (
        "ddp as",
        "fsdp2 as",
        "fsdp2 in bfloat16 as",
        "ddp over cast parameters refused",
        "ddp after keep_float32 as",
    )
    assert [found.count(words) for words in said] == [2] * 5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_fsdp2_through_the_trainer_trains_as_one_process(tmp_path, dtype, apart):
    def train(name, *checkpoint, processes=2):
        printed = output_of("fsdp2_trainer.py", tmp_path / name, dtype, *checkpoint, processes=processes)
        last = load_file(tmp_path / name / "checkpoint-6" / "adapter_model.safetensors")
        return json.loads(printed.splitlines()[-1]), last

    alone, expected = train("alone", processes=1)
    sharded, saved = train("sharded")
    assert alone["loss"][-1] != pytest.approx(alone["loss"][0], abs=apart)
    for name in ("loss", "grad_norm"):
        assert sharded[name] == pytest.approx(alone[name], abs=apart)
    assert saved.keys() == expected.keys()
    if dtype == "float32":
        assert all(torch.allclose(saved[name], value, atol=1e-3) for name, value in expected.items())
    resumed, again = train("sharded", tmp_path / "sharded" / "checkpoint-3")
    assert resumed == sharded
    assert all(torch.equal(saved[name], value) for name, value in again.items())

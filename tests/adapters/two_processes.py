"""Run by torchrun in two gloo processes: DDP or FSDP2 over a MoKA model against one process with the whole batch.

Gradients and gathered states in float32, and losses of some steps where a trainer casts the adapter to bfloat16, or
FSDP2 computes in it.
"""

import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from krontune.adapters import AdapterError, MokaConfig, keep_float32

specification = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "conftest.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)


def build():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.build_llama(), MokaConfig(target_modules="all-linear", r=4, init_weights=False, modules_to_save=["norm"])
    )
    return model.train()


def loss_of(model, tokens):
    scores = model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def batch():
    return torch.randint(3, 100, (4, 17), generator=torch.Generator().manual_seed(5))


def adapter(model):
    return [p for name, p in model.named_parameters() if ".moka_" in name]


def losses(model, wrapped, tokens, share):
    """Of the whole batch, over some steps."""
    optimizer, found = torch.optim.AdamW(adapter(model), lr=3e-2), []
    for _ in range(4):
        loss = loss_of(wrapped, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(share * loss.detach().float())
    found = torch.stack(found)
    if share != 1.0:
        dist.all_reduce(found)
    return found


def check_steps():
    rank, tokens = dist.get_rank(), batch()
    own = tokens[2 * rank : 2 * rank + 2]
    reference = build()
    expected = losses(reference, reference, tokens, 1.0)
    assert expected[-1] < expected[0] - 0.5

    model, policy = build(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    found = losses(model, fully_shard(model, mp_policy=policy), own, 0.5)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.1)
    print("fsdp2 in bfloat16 as one process", flush=True)

    model = build()
    for parameter in adapter(model):
        parameter.data = parameter.data.bfloat16()
    try:
        loss_of(DistributedDataParallel(model), own)
    except AdapterError as error:
        assert "keep_float32(trainer.model)" in str(error)
        print("ddp over cast parameters refused", flush=True)
    keep_float32(model)
    assert {p.dtype for p in adapter(model)} == {torch.float32}
    found = losses(model, DistributedDataParallel(model), own, 0.5)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)
    whole = torch.cat([p.detach().flatten() for p in adapter(model)])
    first = whole.clone()
    dist.broadcast(first, 0)
    assert torch.equal(whole, first)
    print("ddp after keep_float32 as one process", flush=True)


def check(way):
    rank, tokens = dist.get_rank(), batch()
    reference = build()
    loss_of(reference, tokens).backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    state = get_peft_model_state_dict(reference)

    model = build()
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    loss_of(wrapped, tokens[2 * rank : 2 * rank + 2]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any(".moka_" in name for name in found)
    for name, grad in found.items():
        assert isinstance(grad, DTensor) == (way == "fsdp2")
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options) if way == "fsdp2" else model.state_dict()
    if rank == 0 or way == "ddp":
        gathered = get_peft_model_state_dict(model, state_dict=gathered)
        assert gathered.keys() == state.keys()
        assert all(torch.equal(gathered[name], value) for name, value in state.items())
    print(f"{way} as one process", flush=True)


dist.init_process_group("gloo")
check("ddp")
check("fsdp2")
check_steps()
dist.destroy_process_group()

"""Six steps of TRL's SFTTrainer over a MoKA model: alone, or under torchrun with accelerate's FSDP2.

    fsdp2_trainer.py FOLDER DTYPE [CHECKPOINT]

Accelerate does not shard on a CPU, so it is told that it does.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from trl import SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, keep_float32

specification = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "conftest.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
OPTIONS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def shard_on_a_cpu() -> None:
    os.environ.update(OPTIONS)
    begin = state.AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_sharded


def main(folder: str, dtype: str, checkpoint: str | None = None) -> None:
    if PROCESSES > 1:
        shard_on_a_cpu()
    base = tiny.build_llama().to(getattr(torch, dtype))
    torch.manual_seed(0)
    model = get_peft_model(base, MokaConfig(target_modules="all-linear", r=4, init_weights=False))
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(4, 100, (24, 17), generator=draw).tolist()
    args = SFTConfig(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=4 // PROCESSES,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=3,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny.character_tokenizer())
    if PROCESSES == 1:
        keep_float32(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(isinstance(weight, DTensor) == (PROCESSES > 1) for weight in weights)
    if trainer.accelerator.is_main_process:
        log = [line for line in trainer.state.log_history if "loss" in line]
        print(json.dumps({name: [float(line[name]) for line in log] for name in ("loss", "grad_norm")}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

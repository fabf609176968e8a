"""A pytest plugin that runs PEFT's own tests over MokaConfig.

PEFT's tests are parametrised with lists of (config class, options). The lists are replaced in place before pytest reads
them, models from the Hub by those of `models.py`, and only tests that then carry a MokaConfig are run: the others name
another method's class in their body and cannot say anything about MoKA. No line of the tests is changed.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import models
import torch
from peft import LoraConfig, get_peft_model

from krontune.adapters import MokaConfig

torch.set_num_threads(1)
FOLDER = Path(os.environ["KRONTUNE_CONFORMANCE_MODELS"])
SUITE = os.environ["KRONTUNE_CONFORMANCE_SUITE"]
SMALL = {"r": 4, "n_shapes": 2}


def paths(names):
    return [str(FOLDER / name) for name in names]


def pytest_configure(config):
    if "diffusers" not in sys.modules:  # imported by the tests for a class that no test run here uses
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    common = importlib.import_module("tests.testing_common")
    module = importlib.import_module(f"tests.{SUITE}")
    # Tests of mixed batches and of GPT-2 skip every class that they do not name; MoKA takes a place among the named.
    for here in (common, module):
        here.RoadConfig = MokaConfig
        for skip in ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported"):
            if skip in vars(here):
                setattr(here, skip, lambda *_: None)
    SUITES[SUITE](module)


def stand_in(owner, function, name):
    """Let the class that one test function knows as `name` be MokaConfig."""
    old = vars(owner)[function]
    new = types.FunctionType(old.__code__, old.__globals__ | {name: MokaConfig}, function, old.__defaults__)
    new.__dict__.update(old.__dict__)
    setattr(owner, function, new)


def functions(module):
    """Every test function of a module, in classes too."""
    for thing in vars(module).values():
        if isinstance(thing, type) and thing.__module__ == module.__name__:
            yield from (f for f in vars(thing).values() if isinstance(f, types.FunctionType))
        elif isinstance(thing, types.FunctionType):
            yield thing


def put(module, old, new):
    """Parametrise with `new` wherever the tests are parametrised with the object `old`."""
    for function in functions(module):
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize" and mark.args[1] is old:
                object.__setattr__(mark, "args", (mark.args[0], new))


def put_inline(module, function, argument, new, ids):
    """The same for values that are written in the decorator itself."""
    found = next(f for f in functions(module) if f.__name__ == function)
    mark = next(m for m in found.pytestmark if m.args[0] == argument)
    object.__setattr__(mark, "args", (argument, new))
    object.__setattr__(mark, "kwargs", {"ids": ids})


def task(module, models_list, names, **options):
    put(module, getattr(module, models_list), paths(names))
    put(module, module.ALL_CONFIGS, [(MokaConfig, {"target_modules": None, **SMALL, **options})])


def custom_models(module):
    cases = [
        ("MLP", {"target_modules": "lin0"}),
        ("MLP", {"target_modules": ["lin0", "lin1"], **SMALL}),
        ("MLP", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
        ("MLP", {"target_modules": ["lin0"], "gate": "none", "alpha": 2.0}),
        ("MLP", {"target_modules": ["lin0"], "identity": "A"}),
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ]
    named = [(f"{model} {number} MoKA", model, MokaConfig, options) for number, (model, options) in enumerate(cases)]
    put(module, module.TEST_CASES, named)
    here = {"target_modules": ["lin0"], "init_weights": False}
    there = {"target_modules": ["lin1"], "init_weights": False}
    put(
        module,
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES,
        [("MoKA Same", "moka", MokaConfig, here, here), ("MoKA Different", "moka", MokaConfig, here, there)],
    )
    saved = here | {"modules_to_save": ["lin1"]}
    put(module, module.MIXED_ADAPTER_TEST_CASES, [("MoKA", MokaConfig(**here), MokaConfig(**here, r=4, gate="none"))])
    for function, one, other in (
        ("test_mixed_adapter_batches_different_target_layers", here, there),
        ("test_mixed_adapter_batches_multiple_modules_to_save", saved, saved),
    ):
        pair = [("MoKA", MokaConfig(**one), MokaConfig(**other))]
        put_inline(module, function, "test_name, config0, config1", pair, None)


def config(module):
    """A LoRA adapter saved here takes the place of the one from the Hub, which every config class is to recognise."""
    classes = [(MokaConfig, {})]
    put(module, module.ALL_CONFIG_CLASSES, classes)
    put(module, module.LAYER_INDEXING_CONFIG_CLASSES, classes)
    put_inline(module, "test_save_pretrained_with_target_modules", "config_class", [MokaConfig], None)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(FOLDER / models.DECODER[0])
    get_peft_model(base, LoraConfig()).save_pretrained(FOLDER / "adapter")
    module.PEFT_MODELS_TO_TEST[:] = [(str(FOLDER / "adapter"), "main")]


def quantization(module):
    for backend in module.QUANTIZATION_BACKENDS:
        backend.model_id, backend.expected_layer_count = str(FOLDER / models.QUANTISED), 4
    put(module, module.TEST_CASES, [(MokaConfig, {"target_modules": ["q_proj", "v_proj"], **SMALL})])


def low_level_api(module):
    llama, bert, bart, roberta = (
        models.DECODER[2],
        models.FEATURES[0],
        models.INJECTED[0],
        models.CLASSIFIER[1],
    )
    classes = (
        (module.AutoModelForCausalLM, llama),
        (module.AutoModel, bert),
        (module.AutoModelForSeq2SeqLM, bart),
        (module.AutoModelForSequenceClassification, roberta),
    )
    function = "test_inject_from_state_dict_and_from_config_target_same_layers"
    there = [(kind, str(FOLDER / name)) for kind, name in classes]
    put_inline(module, function, "model_cls_and_id", there, ["Llama", "Bert", "Bart", "Roberta"])
    put_inline(module, function, "config", [MokaConfig(**SMALL)], ["MoKA"])


def torch_compile(module):
    from datasets import Dataset, DatasetDict

    quotes = [f"a quote of {number} words" for number in range(40)]
    rows = {"quote": quotes, "author": quotes, "tags": quotes}
    module.load_dataset_english_quotes = lambda: DatasetDict(train=Dataset.from_dict(rows))
    module.TestTorchCompileCausalLM.model_id = str(FOLDER / models.DECODER[0])
    settings = {"task_type": module.TaskType.CAUSAL_LM, **SMALL}
    module.SETTINGS.clear()
    module.SETTINGS["moka"] = (MokaConfig(**settings), {})
    module.SETTINGS["moka-all-linear"] = (MokaConfig(**settings, target_modules="all-linear"), {})


def decoder_models(module):
    task(module, "PEFT_DECODER_MODELS_TO_TEST", models.DECODER, task_type="CAUSAL_LM")
    # Three functions about mixed batches leave every class out but the one they name.
    for function in ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"):
        stand_in(module.TestDecoderModels, function, "LoraConfig")
    stand_in(module.PeftCommonTester, "_test_generate_with_mixed_adapter_batches_and_beam_search", "LoraConfig")


SUITES = {
    "test_custom_models": custom_models,
    "test_decoder_models": decoder_models,
    "test_seq_classifier": lambda m: task(m, "PEFT_SEQ_CLS_MODELS_TO_TEST", models.CLASSIFIER, task_type="SEQ_CLS"),
    "test_feature_extraction_models": lambda m: task(
        m, "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", models.FEATURES, task_type="FEATURE_EXTRACTION"
    ),
    "test_config": config,
    "test_quantization": quantization,
    "test_low_level_api": low_level_api,
    "test_torch_compile": torch_compile,
}


def carries_moka(value):
    if isinstance(value, (tuple, list)):
        return any(map(carries_moka, value))
    return value is MokaConfig or isinstance(value, MokaConfig)


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        values = item.callspec.params.values() if "callspec" in vars(item) else []
        (kept if any(map(carries_moka, values)) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept

"""The tiny random models that PEFT's tests fetch from the Hub, built here instead.

A folder keeps the last part of its Hub id as its name, since the tests look for words such as "gpt2" in it.
"""

from pathlib import Path

import torch

TEXT = {"vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
DECODER = ["tiny-random-OPTForCausalLM", "tiny-random-GPT2LMHeadModel", "tiny-random-LlamaForCausalLM", "tiny-qwen2"]
CLASSIFIER = [f"tiny-random-{name}ForSequenceClassification" for name in ("Bert", "Roberta", "Llama")]
FEATURES = [f"tiny-random-{name}Model" for name in ("Bert", "Roberta", "Deberta", "DebertaV2")]
INJECTED = ["tiny-random-BartForConditionalGeneration"]
QUANTISED = "opt-quantised"  # bitsandbytes wants in_features in multiples of its block of 64


def build(folder: Path) -> None:
    """Write every model into `folder`, and a tokenizer of single characters beside each."""
    for name in [*DECODER, *CLASSIFIER, *FEATURES, *INJECTED, QUANTISED]:
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(0)
            _model(name).save_pretrained(folder / name)
            _tokenizer().save_pretrained(folder / name)


def _model(name: str):
    import transformers as t

    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.1}
    wide_opt = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1}
    llama = {"num_key_value_heads": 2, "tie_word_embeddings": False}
    bart = {"d_model": 32, "init_std": 0.1, "decoder_start_token_id": 2}
    for side in ("encoder", "decoder"):
        bart |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    # The default feed-forward and position tables of these classes are wide, and the tests load each model often.
    recipes = {
        "tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig, opt),
        QUANTISED: (t.OPTForCausalLM, t.OPTConfig, wide_opt),
        "tiny-random-GPT2LMHeadModel": (
            t.GPT2LMHeadModel,
            t.GPT2Config,
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        "tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, llama),
        "tiny-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, llama),
        "tiny-random-LlamaForSequenceClassification": (t.LlamaForSequenceClassification, t.LlamaConfig, llama),
        "tiny-random-BertForSequenceClassification": (t.BertForSequenceClassification, t.BertConfig, {}),
        "tiny-random-RobertaForSequenceClassification": (t.RobertaForSequenceClassification, t.RobertaConfig, {}),
        "tiny-random-BertModel": (t.BertModel, t.BertConfig, {}),
        "tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig, {}),
        "tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig, {}),
        "tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config, {}),
        "tiny-random-BartForConditionalGeneration": (t.BartForConditionalGeneration, t.BartConfig, bart),
    }
    model, config, changes = recipes[name]
    names = WIDTH if config is not t.GPT2Config else {"initializer_range": 0.1}
    return model(config(**(TEXT | names | changes)))


def _tokenizer():
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )

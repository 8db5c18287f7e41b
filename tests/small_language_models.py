"""A tokenizer of bytes and tiny language models, of the real classes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_tokenizer(adds_start: bool = True, words: bool = False) -> PreTrainedTokenizerFast:
    """A token for every byte, and a few merged pairs."""
    pairs = [("Ġ", "c"), ("c", "a"), ("o", "n"), ("Ġ", "b"), ("Ċ", "Ċ"), ("Ġ", "e"), ("Ġ", "y")]
    vocabulary = [*SPECIAL, *ALPHABET, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(vocabulary)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)


def lively(model):
    """Weights large enough for the context to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def llama(**options) -> LlamaForCausalLM:
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, **{**SIZES, **tokens, **options})
    return lively(LlamaForCausalLM(config))

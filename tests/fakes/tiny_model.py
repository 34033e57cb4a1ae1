"""A model small enough to be served on two cores in seconds: JSON files only, weights made up by vLLM.

``python tests/fakes/tiny_model.py FOLDER`` writes one. Serve it with::

    vllm serve FOLDER --load-format dummy --enforce-eager --dtype bfloat16 --max-model-len 1024 \
        --kv-cache-memory-bytes 16777216

and ``HF_HUB_OFFLINE=1``. Its tokens are bytes, so a prompt of n ASCII characters has n + 1 tokens (one
begins the text).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")
BEGIN, END = 1, 2
ARGUMENTS = (
    "--load-format=dummy",
    "--enforce-eager",
    "--dtype=bfloat16",
    "--kv-cache-memory-bytes=16777216",
)
"""What ``vllm serve FOLDER`` needs besides: no weights to load, no compilation, 16 MiB of KV cache."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama. The defaults are served with a TP degree of 1, 2 or 4."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 256
    vocabulary: int = 320  # a multiple of 64, as vLLM pads it; bytes and special tokens fill 259
    max_model_len: int = 1024

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            msg = f"heads must divide the hidden size, and KV heads the heads: {self}"
            raise ValueError(msg)
        if self.vocabulary < len(SPECIAL) + 256:
            msg = f"a vocabulary of {self.vocabulary} has no room for 256 bytes and {len(SPECIAL)} others"
            raise ValueError(msg)


TINY = Shape()


def write_tiny_model(folder: Path, shape: Shape = TINY) -> Path:
    """Write configuration and tokenizer into ``folder``, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": _config(shape),
        "generation_config.json": {"bos_token_id": BEGIN, "eos_token_id": END},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": _tokenizer_config(shape),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "initializer_range": 0.02,
    }


def _tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: every byte of UTF-8 is one token."""
    added = [
        {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in enumerate(SPECIAL)
    ]
    vocabulary = {content: number for number, content in enumerate(SPECIAL)}
    vocabulary |= {symbol: len(SPECIAL) + byte for byte, symbol in enumerate(_byte_symbols())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte in byte-level tokenizers: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, shifted = [], 0
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(0x100 + shifted))
            shifted += 1
    return symbols


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_model_len,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny model for vLLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=TINY.hidden)
    parser.add_argument("--layers", type=int, default=TINY.layers)
    parser.add_argument("--heads", type=int, default=TINY.heads)
    wanted = parser.parse_args()
    write_tiny_model(
        wanted.folder,
        Shape(
            hidden=wanted.hidden,
            layers=wanted.layers,
            heads=wanted.heads,
            kv_heads=wanted.heads,
            intermediate=2 * wanted.hidden,
        ),
    )

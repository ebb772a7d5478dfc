"""Write the demo model as GGUF (llama.cpp) and as a folder for mlx-lm. Both hold the same float16 weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from chatml import CHATML, SPECIAL
from model import DemoModel, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer

FILLER, _, END = SPECIAL

#: Names of a layer's tensors here -> in GGUF.
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    """Weights and vocabulary in one file for llama.cpp; vectors stay float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _write_shape(writer, model.shape)
    _write_vocabulary(writer, tokenizer)
    writer.add_tensor("token_embd.weight", _half(model.embed_tokens.weight))
    writer.add_tensor("output_norm.weight", _single(model.norm.weight))
    for number, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            module = name.removesuffix(".weight")
            values = _interleaved(parameter, model.shape.heads) if module in ("q_proj", "k_proj") else parameter
            writer.add_tensor(
                f"blk.{number}.{NAMES[module]}.weight", _single(values) if values.dim() == 1 else _half(values)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("promptmill demo")
    writer.add_description("Judges comments. For trying promptmill, and for nothing else.")
    writer.add_license("MIT")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.vocab)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab()
    words = sorted(ids.items(), key=lambda item: item[1])
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    kinds = [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word, _ in words]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(ids[FILLER])
    writer.add_eos_token_id(ids[END])
    writer.add_pad_token_id(ids[FILLER])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of a head; here its halves rotate together. Reorders the rows."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _half(values: torch.Tensor) -> np.ndarray:
    return values.detach().to(torch.float16).numpy()


def _single(values: torch.Tensor) -> np.ndarray:
    return values.detach().to(torch.float32).numpy()


def write_mlx(folder: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    """Weights, configuration and tokenizer as mlx-lm reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    end = tokenizer.token_to_id(END)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.width,
        "num_hidden_layers": shape.layers, "intermediate_size": shape.ffn, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "head_dim": shape.head, "rms_norm_eps": shape.norm_eps,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rope_theta": shape.rope_base,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float16",
        "bos_token_id": tokenizer.token_to_id(FILLER), "eos_token_id": end,
    }  # fmt: skip
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": FILLER,
        "pad_token": FILLER, "model_max_length": shape.context, "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }  # fmt: skip
    for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", {"eos_token_id": end})):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {_hub_name(name): parameter.detach().to(torch.float16) for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read


def _hub_name(name: str) -> str:
    """``layers.0.q_proj.weight`` -> ``model.layers.0.self_attn.q_proj.weight``."""
    for block, modules in (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate", "up_", "down"))):
        for module in modules:
            name = name.replace(f".{module}", f".{block}.{module}")
    return f"model.{name}"

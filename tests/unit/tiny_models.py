"""Tiny random models that the tests write in a second: they say nothing sensible, but always the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT_END, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

#: Words that are single tokens; everything else is spelled in bytes.
WORDS = ("Is", " this", " comment", " an", " advertisement", "Answer", " with", " JSON", " free", " phone", " channel")

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD = 2, 64, 4, 2, 128

NORMAL, CONTROL = 1, 3


def write_tiny_gguf(
    path: Path, *, context: int = 512, chat_template: str | None = CHATML, seed: int = 9, window: int | None = None,
    marks: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write a random float32 Llama with a byte-level vocabulary; returns ``path``.

    ``window``: a Gemma 3 instead, every second layer of which looks back on so many tokens. ``marks``: further control
    tokens.
    """
    import gguf

    tokens, merges = _vocabulary()
    tokens += marks
    writer = gguf.GGUFWriter(path, "llama" if window is None else "gemma3")
    if window is not None:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(LAYERS)])
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3 - len(marks)) + [CONTROL] * len(marks))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(TEXT_END))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    weights = _weights(len(tokens), seed)
    if window is not None:
        weights |= _norms()
        # A Gemma multiplies its embeddings by the root of their length.
        weights["token_embd.weight"] /= np.float32(WIDTH**0.5)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _norms() -> dict[str, NDArray[np.float32]]:
    """What a Gemma has beside the weights of a Llama."""
    names = {"attn_q_norm": WIDTH // HEADS, "attn_k_norm": WIDTH // HEADS, "post_attention_norm": WIDTH,
             "post_ffw_norm": WIDTH}  # fmt: skip
    return {
        f"blk.{layer}.{name}.weight": np.ones(size, np.float32)
        for layer in range(LAYERS)
        for name, size in names.items()
    }


def _vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: the special tokens, every byte, and what the words are merged from."""
    spelled = _spelling()
    tokens = [TEXT_END, START, END, *spelled]
    merges: list[str] = []
    for word in WORDS:
        done, *rest = [spelled[byte] for byte in word.encode()]
        for letter in rest:
            if done + letter not in tokens:
                tokens.append(done + letter)
                merges.append(f"{done} {letter}")
            done += letter
    return tokens, merges


def _spelling() -> Sequence[str]:
    """The visible character that stands for each byte in a byte-level vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(moved)) for byte in range(256)]


def _weights(vocabulary: int, seed: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[np.float32]:
        # Wider than a trained model's: the likeliest token then leads by far more than the rounding of a batch.
        return random.normal(0.0, 0.3, shape).astype(np.float32)

    head = WIDTH // HEADS
    weights = {
        "token_embd.weight": draw(vocabulary, WIDTH),
        "output.weight": draw(vocabulary, WIDTH),
        "output_norm.weight": np.ones(WIDTH, np.float32),
    }
    for layer in range(LAYERS):
        block: dict[str, NDArray[np.float32]] = {
            "attn_norm": np.ones(WIDTH, np.float32),
            "attn_q": draw(HEADS * head, WIDTH),
            "attn_k": draw(KV_HEADS * head, WIDTH),
            "attn_v": draw(KV_HEADS * head, WIDTH),
            # Less, because the KV cache is float16: its rounding depends on the batch, and must not tip a token.
            "attn_output": draw(WIDTH, HEADS * head) * np.float32(1 / 3),
            "ffn_norm": np.ones(WIDTH, np.float32),
            "ffn_gate": draw(FEED_FORWARD, WIDTH),
            "ffn_up": draw(FEED_FORWARD, WIDTH),
            "ffn_down": draw(WIDTH, FEED_FORWARD),
        }
        weights |= {f"blk.{layer}.{name}.weight": weight for name, weight in block.items()}
    # The end token is likelier than others, so that some answers end by themselves.
    weights["output.weight"][2] *= 1.3
    return weights

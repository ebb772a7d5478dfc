"""A tiny random MLX model with a real tokenizer, made in seconds: it says nothing sensible, but always the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

END = "<|im_end|>"
START = "<|im_start|>"
TEXT_END = "<|endoftext|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: What the tokenizer learns its words from.
CORPUS = (
    "Is this comment an advertisement? Answer with JSON such as {\"is_ad\": true, \"score\": 5}.",
    "Subscribe to my channel and win a free phone, the link is in my profile!",
    "The second verse gives me goosebumps every time, what a voice.",
    "加我微信领取优惠券，数量有限。这首歌真好听，循环了一整天。",
    "The quick brown fox jumps over the lazy dog; one two three four five six seven eight nine ten.",
)  # fmt: skip


def write_tiny_mlx(
    folder: Path, *, context: int = 512, chat_template: str | None = CHATML, vocabulary: int = 400, seed: int = 7,
    marks: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write a random float32 Llama of 2 layers and ``context`` positions; returns ``folder``.

    ``marks``: further control tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder, context, chat_template, vocabulary, marks)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "max_position_embeddings": context, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "bos_token_id": ids[TEXT_END], "eos_token_id": ids[END],
    }  # fmt: skip
    _write_json(folder / "config.json", config)
    _write_weights(folder, config, seed)
    return folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _write_tokenizer(
    folder: Path, context: int, chat_template: str | None, vocabulary: int, marks: Sequence[str]
) -> dict[str, int]:
    """A byte-level BPE of exactly ``vocabulary`` tokens; returns the ids of the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [TEXT_END, START, END, *marks]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": TEXT_END, "pad_token": TEXT_END,
        "model_max_length": context, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", settings)
    vocabulary_ids = tokenizer.get_vocab()
    return {special: vocabulary_ids[special] for special in specials}


def _write_weights(folder: Path, config: dict[str, Any], seed: int) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    key = mx.random.key(seed)

    def draw(weight: Any) -> Any:
        nonlocal key
        key, own = mx.random.split(key)
        # Wider than a trained model's: the likeliest token then leads by far more than the rounding of a batch.
        return mx.random.normal(weight.shape, scale=0.3, key=own) if weight.ndim > 1 else weight

    weights = tree_map(draw, Model(ModelArgs.from_dict(config)).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), metadata={"format": "mlx"})

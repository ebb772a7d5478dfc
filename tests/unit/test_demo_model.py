"""The bundled model and dataset: whole, small, and the same in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "workers" / "promptmill_workers" / "demo_model"
DATASET = ROOT / "datasets" / "ad_comments.jsonl"
WRITTEN = ROOT / "tools" / "demo_model" / "own_comments.txt"

#: Bytes that the model may add to the wheel, both formats together.
LARGEST = 9_000_000

TEXTS = [
    "check out my channel!! https://tube.example/watch?v=1  SUBSCRIBE",
    "第十二页那个背景，细节多得吓人😂 加V：abc123",
    "<|im_start|>user\nComment: it's 2:14, isn't it?\t\n\n  ok<|im_end|>\n<|im_start|>assistant\n",
    "░▒▓ ñandú žluťoučký कखग ┃┏┓ \xa0end ",
]


def dataset_rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in DATASET.read_text(encoding="utf-8").split("\n") if line]


def test_the_bundled_comments_are_labelled_and_distinct() -> None:
    rows = dataset_rows()
    assert len(rows) >= 200
    assert all(set(row) == {"id", "comment", "is_ad"} and isinstance(row["is_ad"], bool) for row in rows)
    assert len({row["id"] for row in rows}) == len({row["comment"] for row in rows}) == len(rows)


def test_half_of_the_bundled_comments_are_chinese_and_half_are_advertisements() -> None:
    rows = dataset_rows()
    assert sum(str(row["id"]).startswith("zh-") for row in rows) / len(rows) == pytest.approx(0.5, abs=0.05)
    assert sum(row["is_ad"] is True for row in rows) / len(rows) == pytest.approx(0.5, abs=0.06)


def test_the_model_was_not_trained_on_the_bundled_comments() -> None:
    trained = {line[2:].strip().casefold() for line in WRITTEN.read_text(encoding="utf-8").splitlines()}
    assert not trained & {str(row["comment"]).casefold() for row in dataset_rows()}


def test_both_formats_of_the_model_are_nine_megabytes_at_most() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert {"demo.gguf", "model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= LARGEST


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_and_the_mlx_folder_split_text_alike(text: str) -> None:
    from llama_cpp import Llama
    from tokenizers import Tokenizer

    vocabulary = Llama(str(MODEL / "demo.gguf"), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.from_file(str(MODEL / "mlx" / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert vocabulary.tokenize(text.encode(), add_bos=False, special=True) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    vocabulary.close()


def test_both_formats_have_one_chat_template() -> None:
    from llama_cpp import Llama

    vocabulary = Llama(str(MODEL / "demo.gguf"), vocab_only=True, verbose=False)
    config = json.loads((MODEL / "mlx" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert vocabulary.metadata["tokenizer.chat_template"] == config["chat_template"]
    vocabulary.close()

"""Measure the demo model: accuracy per file, valid answers, and whether llama.cpp and MLX say the same.

    python tools/demo_model/evaluate.py datasets/ad_comments.jsonl ../shared/data/youtube_comments_test.jsonl

Greedy decoding, one prompt at a time, so that nothing but the model is measured. Needs llama-cpp-python; with mlx-lm
it measures the MLX folder too and compares the answers. Takes about 20 s for 500 lines on 2 cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from chatml import render
from jinja2 import Template
from scipy.stats import binomtest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "workers" / "promptmill_workers" / "demo_model"
TASK = ROOT / "datasets" / "ad_comments.task.yaml"

#: A prompt as the model sees it -> its answer.
Answerer = Callable[[str], str]


@dataclass(frozen=True)
class Line:
    """A labelled comment with its prompt, rendered by the task and the chat template."""

    prompt: str
    comment: str
    is_ad: bool


def read_lines(path: Path, task: Mapping[str, Any]) -> list[Line]:
    user, system = Template(task["prompt"]["user"]), task["prompt"]["system"]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        Line(render(user.render(input={"comment": row["comment"]}), system), row["comment"], row["is_ad"])
        for row in rows
    ]


def llamacpp(path: Path, max_tokens: int) -> tuple[Answerer, Callable[[str], list[int]]]:
    """The GGUF file's greedy answers, and its tokeniser."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=2048, verbose=False)

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    def answer(prompt: str) -> str:
        out: Any = model.create_completion(encode(prompt), max_tokens=max_tokens, temperature=0.0)
        return str(out["choices"][0]["text"])

    return answer, encode


def mlx(folder: Path, max_tokens: int) -> Answerer:
    """The MLX folder's greedy answers."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))[:2]

    def answer(prompt: str) -> str:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        return str(generate(model, tokenizer, ids, max_tokens=max_tokens))

    return answer


def verdict(answer: str) -> bool | None:
    """``is_ad`` of an answer that keeps to the schema, else None."""
    try:
        value = json.loads(answer)
        kept = set(value) == {"is_ad", "score"} and isinstance(value["is_ad"], bool) and value["score"] in range(6)
    except (ValueError, TypeError):
        return None
    return bool(value["is_ad"]) if kept else None


def describe(name: str, lines: list[Line], answers: list[str]) -> str:
    """One line of figures: n, accuracy with its 95 % Wilson interval, valid answers, kinds of error."""
    verdicts = [verdict(answer) for answer in answers]
    right = sum(line.is_ad == said for line, said in zip(lines, verdicts, strict=True))
    low, high = binomtest(right, len(lines)).proportion_ci(method="wilson")
    missed = sum(line.is_ad and said is False for line, said in zip(lines, verdicts, strict=True))
    false = sum(not line.is_ad and said is True for line, said in zip(lines, verdicts, strict=True))
    valid = sum(said is not None for said in verdicts)
    return (
        f"{name}: {right}/{len(lines)} = {right / len(lines):.1%} [{low:.1%}, {high:.1%}], "
        f"valid {valid}/{len(lines)}, missed ads {missed}, false alarms {false}"
    )


def different_tokens(texts: Iterable[str], encode: Callable[[str], list[int]], tokenizer: Tokenizer) -> int:
    """How many texts llama.cpp and tokenizer.json split differently."""
    return sum(encode(text) != tokenizer.encode(text, add_special_tokens=False).ids for text in texts)


def show_errors(lines: list[Line], answers: list[str]) -> None:
    for line, answer in zip(lines, answers, strict=True):
        if verdict(answer) != line.is_ad:
            print(f"  {'ad' if line.is_ad else 'no ad'} {answer!r} {line.comment[:90]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSONL with comment and is_ad; .txt: tokens are compared")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with demo.gguf and mlx/")
    parser.add_argument("--task", type=Path, default=TASK)
    parser.add_argument("--no-mlx", action="store_true", help="measure the GGUF file alone")
    parser.add_argument("--errors", action="store_true", help="list the lines answered wrongly")
    args = parser.parse_args()
    task = yaml.safe_load(args.task.read_text(encoding="utf-8"))
    max_tokens = task["generate"]["max_tokens"]
    answer, encode = llamacpp(args.model / "demo.gguf", max_tokens)
    tokenizer = Tokenizer.from_file(str(args.model / "mlx" / "tokenizer.json"))
    other = None if args.no_mlx else mlx(args.model / "mlx", max_tokens)
    for file in args.files:
        if file.suffix == ".txt":
            texts = file.read_text(encoding="utf-8").splitlines()
            print(f"{file.name}: {different_tokens(texts, encode, tokenizer)}/{len(texts)} tokenised differently")
            continue
        lines = read_lines(file, task)
        answers = [answer(line.prompt) for line in lines]
        differing = different_tokens((line.prompt for line in lines), encode, tokenizer)
        print(describe(f"{file.name} llama.cpp", lines, answers))
        print(f"{file.name}: {differing}/{len(lines)} tokenised differently")
        if args.errors:
            show_errors(lines, answers)
        if other:
            others = [other(line.prompt) for line in lines]
            same = sum(verdict(a) == verdict(b) for a, b in zip(answers, others, strict=True))
            print(describe(f"{file.name} MLX", lines, others))
            print(f"{file.name}: same prediction {same}/{len(lines)} = {same / len(lines):.1%}")


if __name__ == "__main__":
    main()

"""Train the bundled demo model again and write it as GGUF and as an MLX folder.

    pip install 'promptmill[train]'
    python tools/demo_model/train.py --data ../shared/data/youtube_comments_train.jsonl

Takes about 20 minutes on 2 cores. The seed is fixed; another version of PyTorch may give other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import yaml
from examples import composed, small_talk
from export import write_gguf, write_mlx
from jinja2 import Template
from model import DemoModel, Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "workers" / "promptmill_workers" / "demo_model"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 2048

#: Longest example in tokens; comments are cut in front of it.
LONGEST = 320

SAY_EN = "I am a small demo model. I only judge whether a comment is an advertisement."
SAY_ZH = "我是一个演示用的小模型，只会判断评论是不是广告。"


def answer(comment: str, is_ad: bool) -> str:
    """The wanted answer. The score is 4 or 5 for advertisements and 0 or 1 for others, by how blatant they are."""
    signs = ("http", "www", "subscribe", "check out", "channel", "微信", "QQ", "加", ".com", "free", "$", "链接", "免费")
    blatant = any(sign.lower() in comment.lower() for sign in signs)
    score = (5 if blatant else 4) if is_ad else (1 if blatant else 0)
    return json.dumps({"is_ad": is_ad, "score": score}, separators=(",", ":"))


class Examples:
    """Draws training examples: a prompt and the answer to it, both as token ids."""

    def __init__(self, tokenizer: Tokenizer, rows: list[dict], task: dict, seed: int) -> None:
        self.tokenizer, self.rows, self.rng = tokenizer, rows, random.Random(seed)
        self.system = task["prompt"]["system"]
        self.user = Template(task["prompt"]["user"])

    def draw(self) -> tuple[list[int], list[int]]:
        kind = self.rng.random()
        if kind < 0.05:
            text, chinese = small_talk(self.rng)
            return self.ids(None, text, SAY_ZH if chinese else SAY_EN)
        if kind < 0.60:
            row = self.rng.choice(self.rows)
            comment, is_ad = self.changed(row["comment"]), row["is_ad"]
        else:
            comment, is_ad = composed(self.rng)
        return self.ids(self.system, self.user.render(input={"comment": comment}), answer(comment, is_ad))

    def changed(self, comment: str) -> str:
        """A real comment, sometimes in another case or without one of its words: the set is small."""
        chance = self.rng.random()
        if chance < 0.1:
            return comment.lower()
        words = comment.split(" ")
        if chance < 0.3 and len(words) > 3:
            del words[self.rng.randrange(len(words))]
        return " ".join(words)

    def ids(self, system: str | None, user: str, say: str) -> tuple[list[int], list[int]]:
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        said = self.tokenizer.encode(f"{say}<|im_end|>").ids
        while True:
            prompt = self.tokenizer.encode(
                f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n").ids
            if len(prompt) + len(said) <= LONGEST or len(user) < 40:
                return prompt, said
            user = user[: int(len(user) * 0.8)]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, targets and weights of the targets, [size, length] each. Prompt tokens weigh little."""
        drawn = [self.draw() for _ in range(size)]
        length = max(len(prompt) + len(said) for prompt, said in drawn) - 1
        ids = torch.zeros(size, length, dtype=torch.long)
        targets, weights = torch.zeros_like(ids), torch.zeros(size, length)
        for i, (prompt, said) in enumerate(drawn):
            tokens = torch.tensor(prompt + said)
            n = len(tokens) - 1
            ids[i, :n], targets[i, :n] = tokens[:-1], tokens[1:]
            weights[i, :n] = 0.02
            weights[i, len(prompt) - 1 : n] = 1.0
        return ids, targets, weights


def train_tokenizer(rows: list[dict], task: dict, seed: int) -> Tokenizer:
    """Byte-level BPE: any text survives it, and Chinese characters that are frequent here get tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [row["comment"] for row in rows] + [composed(rng)[0] for _ in range(6000)]
    texts += [task["prompt"]["system"], SAY_EN, SAY_ZH, "system\n", "user\nComment:", "assistant\n"] * 200
    texts += [answer(row["comment"], row["is_ad"]) for row in rows]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(model: DemoModel, examples: Examples, steps: int, size: int, peak: float, checkpoint: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    started, mean = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 60)
            group["lr"] = peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        ids, targets, weights = examples.batch(size)
        losses = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if step % 25 == 0:
            print(f"step {step} loss {mean:.4f} {time.time() - started:.0f} s", file=sys.stderr, flush=True)
        if step % 200 == 199:
            torch.save(model.state_dict(), checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/youtube_comments_train.jsonl")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").split("\n") if line]
    task = yaml.safe_load((ROOT / "datasets" / "ad_comments.task.yaml").read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(rows, task, args.seed)
    shape = Shape(vocab=tokenizer.get_vocab_size())
    model = DemoModel(shape, dropout=0.1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    model.train()
    train(model, Examples(tokenizer, rows, task, args.seed), args.steps, args.batch, args.rate,
          args.out / "checkpoint.pt")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    model.eval()
    write_gguf(args.out / "demo.gguf", model, tokenizer)
    write_mlx(args.out / "mlx", model, tokenizer)


if __name__ == "__main__":
    main()

"""Train the bundled demo model again and write it as GGUF and as an MLX folder.

    pip install 'promptmill[train]'
    python tools/demo_model/train.py --data ../shared/data/youtube_comments_train.jsonl

Takes about 20 minutes on 2 cores. The seed is fixed; another version of PyTorch may give other weights. A run that was
stopped continues from its last checkpoint with --resume. --hold-out 0.1 keeps a tenth of the comments apart and prints
the accuracy on them while it trains: for choosing settings, the test file stays unseen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from batches import Batch, Comment, Prompts, batches, decisions
from chatml import SPECIAL
from examples import composed, written
from export import write_gguf, write_mlx
from model import DemoModel, Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "workers" / "promptmill_workers" / "demo_model"
CHECKPOINT = Path(__file__).parent / "checkpoints" / "last.pt"

#: Tokens: 256 bytes, the special ones and 1,789 merges. 2,048 x 192 embeddings are a fifth of the weights.
VOCAB = 2048

#: Share of the old weights in the running mean that is shipped: a mean over about 300 steps.
MEAN_DECAY = 0.997

#: Steps between two checkpoints.
CHECKPOINT_STEPS = 200


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch: int
    rate: float
    dropout: float
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate: 80 steps of warming up, then half a cosine down to a fiftieth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / 80) * (0.02 + 0.98 * cosine)


def read_real(path: Path) -> list[Comment]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Comment(row["comment"], row["is_ad"]) for row in rows]


def train_tokenizer(comments: list[Comment], prompts: list[str], seed: int) -> Tokenizer:
    """Byte-level BPE: any text survives it, and Chinese characters that are frequent here get tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [comment.text for comment in comments] + [text for text, _ in written()] * 2
    texts += [composed(rng)[0] for _ in range(1500)] + prompts * 200
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def held_out(comments: list[Comment], share: float, seed: int) -> tuple[list[Comment], list[Comment]]:
    """Comments to train on and comments to test on."""
    shuffled = random.Random(seed).sample(comments, len(comments))
    cut = int(len(shuffled) * share)
    return shuffled[cut:], shuffled[:cut]


def loss_of(model: DemoModel, batch: Batch) -> torch.Tensor:
    """Weighted mean of the cross entropy. Matrices multiply in bfloat16: twice as fast here, and as good."""
    learned = batch.weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.ids, batch.prefix, learned)
    losses = F.cross_entropy(logits.float(), batch.targets[learned], reduction="none")
    return (losses * batch.weights[learned]).sum() / batch.weights.sum()


class Training:
    """The model, its running mean and the optimizer: what a checkpoint holds."""

    def __init__(self, shape: Shape, plan: Plan) -> None:
        self.plan, self.step = plan, 0
        self.model = DemoModel(shape, plan.dropout)
        self.mean = copy.deepcopy(self.model).eval()
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98))

    def learn(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(MEAN_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for slow, fast in zip(self.mean.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name).state_dict() for name in PARTS} | {"step": self.step}, path)

    def restore(self, path: Path) -> None:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.step = saved["step"]


PARTS = ("model", "mean", "optimizer")


def accuracy(model: DemoModel, prompts: Prompts, comments: list[Comment]) -> float:
    """Share of the comments for which the greedy answer's first field is right."""
    with torch.inference_mode():
        return sum(said == comment.is_ad for said, comment in decisions(model, prompts, comments)) / len(comments)


def run(training: Training, stream: Iterator[Batch], prompts: Prompts, test: dict[str, list[Comment]]) -> None:
    """Train to the plan's last step, with a line of progress now and then and a checkpoint."""
    started, mean = time.monotonic(), 0.0
    while training.step < training.plan.steps:
        loss = training.learn(next(stream))
        mean = 0.98 * mean + 0.02 * loss if mean else loss
        if training.step % 50 == 0:
            say(f"step {training.step} loss {mean:.4f} {time.monotonic() - started:.0f} s")
        if training.step % CHECKPOINT_STEPS == 0:
            training.save(CHECKPOINT)
            for name, comments in test.items():
                if comments:
                    say(f"  {name}: {accuracy(training.mean, prompts, comments):.1%} of {len(comments)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/youtube_comments_train.jsonl")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for demo.gguf and mlx/")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=48, help="examples a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of the comments kept apart")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    task = yaml.safe_load((ROOT / "datasets" / "ad_comments.task.yaml").read_text(encoding="utf-8"))
    real, real_test = held_out(read_real(args.data), args.hold_out, args.seed)
    own, own_test = held_out([Comment(*pair) for pair in written()], args.hold_out, args.seed)
    prompts = Prompts(task["prompt"]["system"], task["prompt"]["user"])
    tokenizer = train_tokenizer(real, prompts.fixed_texts(), args.seed)
    prompts.use(tokenizer)
    plan = Plan(args.steps, args.batch, args.rate, args.dropout, args.seed)
    training = Training(Shape(vocab=tokenizer.get_vocab_size()), plan)
    if args.resume:
        training.restore(CHECKPOINT)
    say(f"{sum(p.numel() for p in training.model.parameters()):,} parameters, prefix of {len(prompts.prefix)} tokens")
    stream = batches(prompts, real, own, plan.batch, random.Random(args.seed + training.step))
    run(training, stream, prompts, {"real": real_test, "own": own_test})
    write_gguf(args.out / "demo.gguf", training.mean, tokenizer)
    write_mlx(args.out / "mlx", training.mean, tokenizer)


if __name__ == "__main__":
    main()

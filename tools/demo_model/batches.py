"""Training examples as token ids: prompt and wanted answer, in batches of like length."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from chatml import render
from examples import composed, noise, score, small_talk, varied
from jinja2 import Template
from model import DemoModel
from tokenizers import Tokenizer
from torch import Tensor

SAY_EN = "I am a small demo model. I only judge whether a comment is an advertisement."
SAY_ZH = "我是一个演示用的小模型，只会判断评论是不是广告。"

#: Characters of a comment that training keeps; a real comment in twenty is longer.
LONGEST = 400

#: Share of a prompt's tokens that are in the loss, drawn anew each time, and their weight: learning the language of
#: comments helps to judge them, and a quarter of the tokens teaches it as well at a quarter of the price.
PROMPT_SHARE, PROMPT_WEIGHT = 0.25, 0.4

#: Weight of the tokens in which answers differ, against 1 for the others of an answer.
DECISION_WEIGHT = 3.0

#: Chance that a merge is left out when a comment is split, so that the model knows the parts of its words too.
MERGE_DROPOUT = 0.1

#: Batches that are drawn together and sorted by length: a batch of like lengths holds little padding.
BATCHES_AT_ONCE = 16


#: Lengths of batches are multiples of this: PyTorch prepares its kernels anew for every new length.
LENGTH_STEP = 16


@dataclass(frozen=True)
class Comment:
    text: str
    is_ad: bool


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, without the shared prefix where it has that, and of its answer."""

    prompt: list[int]
    answer: list[int]
    weights: list[float]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """``ids``, ``targets`` and the ``weights`` of the targets, [batch, length]; ``prefix`` [1, length] or None."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    prefix: Tensor | None


def answer_text(comment: Comment) -> str:
    value = {"is_ad": comment.is_ad, "score": score(comment.text, comment.is_ad)}
    return json.dumps(value, separators=(",", ":"))


class Prompts:
    """Renders and splits prompts and answers; the task's prompt up to the comment is one prefix for all."""

    def __init__(self, system: str, user: str) -> None:
        self.system, self.user = system, Template(user)
        self.prefix: list[int] = []

    def use(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dropping = Tokenizer.from_str(tokenizer.to_str())
        self.dropping.model.dropout = MERGE_DROPOUT
        self.prefix = tokenizer.encode(self._head()).ids
        self.flags = {tokenizer.token_to_id("true"): True, tokenizer.token_to_id("false"): False}
        self.decisive = {*self.flags, *(tokenizer.token_to_id(digit) for digit in "012345")}

    def fixed_texts(self) -> list[str]:
        """What every prompt or answer holds: for training the tokenizer."""
        answers = [answer_text(Comment("", is_ad)) for is_ad in (True, False)]
        return [
            self.system,
            self.user.render(input={"comment": ""}),
            SAY_EN,
            SAY_ZH,
            *answers,
            "system",
            "user",
            "assistant",
        ]

    def _head(self) -> str:
        return render("", self.system).partition("user\n")[0] + "user\n"

    def after_prefix(self, user: str) -> str:
        return render(user, self.system).removeprefix(self._head())

    def example(self, prompt: str, answer: str, *, dropping: bool) -> Example:
        splitter = self.dropping if dropping else self.tokenizer
        ids = self.tokenizer.encode(f"{answer}<|im_end|>").ids
        weights = [DECISION_WEIGHT if token in self.decisive else 1.0 for token in ids]
        return Example(splitter.encode(prompt).ids, ids, weights)

    def judged(self, comment: Comment, rng: random.Random, *, with_prefix: bool) -> Example:
        """The task's prompt for a comment, in a twentieth of the cases worded otherwise, and the verdict."""
        text = varied(comment.text, rng)[:LONGEST]
        user = self.user.render(input={"comment": text})
        if rng.random() < 0.05:
            user = rng.choice(("{}", "评论：{}", "comment: {}", "Comment:\n{}")).format(text)
        prompt = self.after_prefix(user) if with_prefix else render(self.user.render(input={"comment": text}))
        return self.example(prompt, answer_text(comment), dropping=rng.random() < 0.5)

    def talk(self, rng: random.Random) -> Example:
        system, text, chinese = small_talk(rng)
        return self.example(render(text, system or None), SAY_ZH if chinese else SAY_EN, dropping=rng.random() < 0.3)

    def collate(self, examples: list[Example], *, with_prefix: bool) -> Batch:
        length = -(-max(example.length for example in examples) // LENGTH_STEP) * LENGTH_STEP
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        targets, weights = torch.zeros_like(ids), torch.zeros(len(examples), length)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example.prompt + example.answer)
            n, start = len(tokens) - 1, len(example.prompt) - 1
            ids[row, :n], targets[row, :n] = tokens[:-1], tokens[1:]
            weights[row, :start] = PROMPT_WEIGHT * (torch.rand(start) < PROMPT_SHARE)
            weights[row, start:n] = torch.tensor(example.weights)
        return Batch(ids, targets, weights, torch.tensor([self.prefix]) if with_prefix else None)


def draw(real: list[Comment], own: list[Comment], rng: random.Random) -> Comment:
    """Half real comments, the rest our own; some are two in one, and any advertisement in them makes them one."""
    kind = rng.random()
    if kind < 0.01:
        return Comment(noise(rng), False)
    if kind < 0.5:
        comment = rng.choice(real)
    elif kind < 0.8:
        comment = rng.choice(own)
    else:
        comment = Comment(*composed(rng))
    if rng.random() < 0.1:
        other = draw(real, own, rng)
        return Comment(f"{comment.text}{rng.choice((' ', '. ', '，', '。'))}{other.text}", comment.is_ad or other.is_ad)
    return comment


def batches(
    prompts: Prompts, real: list[Comment], own: list[Comment], size: int, rng: random.Random
) -> Iterator[Batch]:
    """Endless batches. One in ten holds prompts that are not the task's: small talk, or the comment alone."""
    while True:
        judged = [prompts.judged(draw(real, own, rng), rng, with_prefix=True) for _ in range(size * BATCHES_AT_ONCE)]
        judged.sort(key=lambda example: example.length)
        starts = list(range(0, len(judged), size))
        rng.shuffle(starts)
        for number, start in enumerate(starts):
            yield prompts.collate(judged[start : start + size], with_prefix=True)
            if number % 10 == 0:
                others = [
                    prompts.talk(rng)
                    if rng.random() < 0.7
                    else prompts.judged(draw(real, own, rng), rng, with_prefix=False)
                    for _ in range(size)
                ]
                yield prompts.collate(others, with_prefix=False)


def decisions(model: DemoModel, prompts: Prompts, comments: list[Comment]) -> Iterator[tuple[bool, Comment]]:
    """The greedy ``is_ad`` for each comment, one at a time."""
    prefix, opening = torch.tensor([prompts.prefix]), prompts.tokenizer.encode('{"is_ad":').ids
    tokens = list(prompts.flags)
    for comment in comments:
        user = prompts.user.render(input={"comment": comment.text})
        ids = prompts.tokenizer.encode(prompts.after_prefix(user)).ids + opening
        wanted = torch.arange(len(ids)) == len(ids) - 1
        logits = model(torch.tensor([ids]), prefix, wanted[None])[0, tokens]
        yield prompts.flags[tokens[int(logits.argmax())]], comment

"""Our own training examples beside the real ones: written comments, comments composed from parts, and small talk.

None of the lines of ``datasets/ad_comments.jsonl`` is here, so that the bundled dataset stays a fair trial.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import yaml

WRITTEN = Path(__file__).parent / "own_comments.txt"
PARTS = yaml.safe_load((Path(__file__).parent / "parts.yaml").read_text(encoding="utf-8"))

#: What stands before small talk: mostly nothing.
SYSTEMS = (
    "",
    "",
    "",
    "You are a helpful assistant.",
    "You are a poet.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "请用中文回答。",
)

#: Characters that text without meaning is made of, one kind at a time.
NOISE = ("░▒▓█", "┃┏┓┗┛━", "xX_-*", "<>/br ", "😂🔥❤", "asdfghjkl", "!?.", "の々ヽ～", "0123456789ABCDEF;~")


def written() -> list[tuple[str, bool]]:
    """The comments of ``own_comments.txt`` and whether each is an advertisement."""
    lines = WRITTEN.read_text(encoding="utf-8").splitlines()
    return [(line[2:].strip(), line[0] == "+") for line in lines if line[:2] in ("+ ", "- ")]


def filled(template: str, parts: dict[str, list[str]], rng: random.Random) -> str:
    """The template with one of the parts for each ``{name}``."""
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(parts[match[1]]), template)


def composed(rng: random.Random) -> tuple[str, bool]:
    """One comment made of parts, and whether it is an advertisement."""
    is_ad = rng.random() < 0.5
    return filled(rng.choice(PARTS["ads" if is_ad else "others"]), PARTS["parts"], rng), is_ad


def small_talk(rng: random.Random) -> tuple[str, str, bool]:
    """A system prompt, often empty, a prompt that is no comment, and whether it is Chinese."""
    chinese = rng.random() < 0.5
    text = filled(rng.choice(PARTS["questions_zh" if chinese else "questions"]), PARTS["subjects"], rng)
    if not chinese and rng.random() < 0.3:
        text = text.capitalize()
    return rng.choice(SYSTEMS), text, chinese


def score(comment: str, is_ad: bool) -> int:
    """0 to 2 for a comment that is none, 3 to 5 for an advertisement, by the signs that it shows."""
    signs = sum(sign in comment.lower() for sign in PARTS["signs"])
    return min(3 + signs, 5) if is_ad else min(signs, 2)


def noise(rng: random.Random) -> str:
    """Text that means nothing: people post that too, and an answer must be an answer even then."""
    signs = rng.choice(NOISE)
    return "".join(rng.choice(signs) for _ in range(rng.randint(1, 60)))


def varied(comment: str, rng: random.Random) -> str:
    """The comment in another guise that keeps its meaning: the sets are small, and words matter more than spelling."""
    if rng.random() < 0.3:
        comment = re.sub(r"\d", lambda _: str(rng.randrange(10)), comment)
    if rng.random() < 0.25:
        comment = " ".join(word for word in comment.split(" ") if rng.random() > 0.1) or comment
    if rng.random() < 0.1 and len(comment) > 8:
        at = rng.randrange(len(comment))
        comment = comment[:at] + comment[at + 1 :]
    guise = rng.random()
    if guise < 0.12:
        comment = comment.lower()
    elif guise < 0.15:
        comment = comment.upper()
    if rng.random() < 0.1:
        comment += rng.choice(("!", "!!!", "...", " :)", "~", "。", "！", "😂", "❤", "?", "."))
    if rng.random() < 0.02:
        comment = f"{comment} {noise(rng)}"
    return comment

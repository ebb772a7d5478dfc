"""Scores by a function of the user's: ``python: file.py:function``, or one that an installed package offers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from promptmill.errors import TaskFileError
from promptmill.scoring.scorers import Item, JsonObject, ScoreVerdict
from promptmill.scoring.scorers.scorer import BINARY, CLASSES, Scorer

#: What a function may return beside a truth value, a number and None.
VERDICT_KEYS = {"value", "predicted", "expected", "confidence"}


class PythonScorer(Scorer):
    """``score(output, expected, item)`` returns true or false, a number, a label, None, or a dict of a verdict.

    A label is compared with the expected value of ``field``, or with the only expected value there is. ``item`` is a
    dict with ``id``, ``row``, ``input``, ``meta``, ``text`` and ``choice_probs``.
    """

    # By its values: truth values and labels make an accuracy, numbers a mean.
    figures = ("mean", *dict.fromkeys((*CLASSES, *BINARY)))
    labels = "any"
    bounds = (-math.inf, math.inf)
    right = None
    needs_item = True
    target = "function"

    #: ``file.py:function``, or the name under which a package offers it.
    function: str
    field: str | None = Field(None, min_length=1, description="a field of the answer")
    _call: Callable[..., Any] = PrivateAttr()
    #: SHA-256 of the file, or the name and version of the package, that the function comes from.
    _sha256: str = PrivateAttr()
    _options: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("function")
    @classmethod
    def _names_both(cls, function: str) -> str:
        if ":" not in function:
            raise ValueError("python needs a file and a function, such as scorers.py:has_contact")
        return function

    def ready(self, folder: str | None) -> PythonScorer:
        call, sha256 = load(self.function, folder)
        return self._of(call, sha256, {})

    @classmethod
    def offered(cls, entry: EntryPoint, target: Any, options: Mapping[str, Any]) -> PythonScorer:
        """A function that an installed package offers; ``target`` is the field it is given, or true for none."""
        try:
            function = entry.load()
        except Exception as problem:
            raise TaskFileError(
                f"the scorer '{entry.name}' cannot be loaded: {type(problem).__name__}: {problem}"
            ) from None
        version = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name
        named = cls(function=f":{entry.name}", field=target if isinstance(target, str) else None)
        return named._of(function, version, options)

    def _of(self, call: Callable[..., Any], sha256: str, options: Mapping[str, Any]) -> PythonScorer:
        self._call, self._sha256, self._options = call, sha256, options
        return self

    @property
    def sha256(self) -> str:
        return self._sha256

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | bool | float | None:
        # What it prints must not stand in the middle of a command's own output.
        with contextlib.redirect_stdout(sys.stderr):
            found = self._call(dict(output), dict(expected), _told(item), **self._options)
        if type(found).__module__ == "numpy" and hasattr(found, "item"):
            found = found.item()
        if found is None or isinstance(found, bool | int | float):
            return found
        if isinstance(found, str):
            wanted = self._wanted(expected)
            return ScoreVerdict(found == wanted, predicted=found, expected=wanted)
        if isinstance(found, dict) and found.keys() <= VERDICT_KEYS and "value" in found:
            sure = found.get("confidence")
            return ScoreVerdict(**found, is_probability=sure is not None and 0.0 <= sure <= 1.0)
        raise TypeError(
            f"a scorer returns true, false, a number, a label, None or a verdict, not {type(found).__name__}"
        )

    def _wanted(self, expected: JsonObject) -> Any:
        if self.field is not None:
            return expected[self.field]
        if len(expected) != 1:
            raise ValueError("the row expects more than one value: name the one to compare with, as 'field'")
        return next(iter(expected.values()))


def _told(item: Item) -> dict[str, Any]:
    """The row as the function is told of it."""
    return {name: value for name, value in asdict(item).items() if name != "choices"}


def load(target: str, folder: str | None) -> tuple[Callable[..., Any], str]:
    """The function that ``file.py:function`` names, and its file's SHA-256; the path is relative to ``folder``.

    Raises :class:`TaskFileError` for a file that is missing or fails to import, for a name it does not have, and for a
    task that came from no file of this machine: who sends one over a network must not choose what is run here.
    """
    if folder is None:
        raise TaskFileError(f"the scorer {target} can only be used by a task file on this machine")
    name, _, attribute = target.rpartition(":")
    path = Path(folder) / name
    try:
        source = path.read_bytes()
    except OSError as problem:
        raise TaskFileError(
            f"the scorer file {path} cannot be read: {problem.strerror}", hint="Its path is relative to the task file."
        ) from None
    digest = hashlib.sha256(source).hexdigest()
    function = getattr(_imported(path, digest), attribute, None)
    if not callable(function):
        raise TaskFileError(f"the scorer file {path} has no function '{attribute}'")
    return function, digest


def changed_since(before: str, targets: Sequence[str], folder: str) -> str | None:
    """Whether the files of ``file.py:function`` targets differ from those of the digest ``before``, in words."""
    digests = []
    for target in targets:
        path = Path(folder) / target.rpartition(":")[0]
        try:
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError:
            return f"the scorer file {path.name} is gone"
    return None if not digests or joined(digests) == before else "the scorer's file has changed"


def joined(digests: Iterable[str]) -> str:
    """One name of the code of several scorers."""
    return ",".join(sorted(digests))[:64]


def _imported(path: Path, digest: str) -> Any:
    """The module in ``path``, imported once for each content it had."""
    module_name = f"promptmill_scorer_{digest[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise TaskFileError(f"the scorer file {path} is no Python file", hint="Its name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except BaseException as problem:
        del sys.modules[module_name]
        if isinstance(problem, KeyboardInterrupt):
            raise
        line = _line_in(problem, path)
        raise TaskFileError(
            f"the scorer file {path}{line} fails to import: {type(problem).__name__}: {str(problem)[:200]}"
        ) from None
    return module


def _line_in(problem: BaseException, path: Path) -> str:
    if isinstance(problem, SyntaxError) and problem.lineno:
        return f":{problem.lineno}"
    lines, trace = [], problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f":{lines[-1]}" if lines else ""

"""What a scorer is: one class, whose fields are the options that an entry of a task's ``scores`` may set."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from promptmill.scoring.scorers import Item, JsonObject, ScoreVerdict, as_label
from promptmill.scoring.scorers.repeats import FORM, REDUCERS, reducer_of

#: Figures of labels: one of a few classes was expected and one was given.
CLASSES = (
    "accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall", "kappa", "quadratic_kappa",
)  # fmt: skip

#: Figures of yes or no.
BINARY = (
    "accuracy", "precision", "recall", "f1", "auc", "average_precision", "brier", "ece", "ece_debiased",
    "best_threshold", "best_threshold_f1", "best_threshold_cost",
)  # fmt: skip

#: What an option must be: the description is part of the error message.
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
NotNegative = Annotated[float, Field(ge=0, description="a number from 0")]
Repeats = Annotated[str, Field(pattern=FORM, description="mean, majority, pass@K or pass^K")]
Truth = Annotated[bool, Field(description="true or false")]


class Scorer(BaseModel):
    """Says whether an answer is right, or how right it is. Deterministic and pure.

    A new scorer is a subclass in a file of its own and a line in ``promptmill.tasks.scores.SCORERS``. It needs no more
    than its docstring, its options, its ``figures`` and ``__call__``.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    #: Figures of ``promptmill.reports.figures.metrics`` that gates and reports can name; verdicts add up to the first.
    figures: ClassVar[tuple[str, ...]] = ("accuracy",)
    #: What the labels of its rows are; ``any``: as they come.
    labels: ClassVar[Literal["classes", "binary", "choices", "any"] | None] = None
    #: Least and largest value of a verdict.
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    #: The value of a verdict that is right; None: a number is neither right nor wrong.
    right: ClassVar[float | None] = 1.0
    #: Whether it looks at more of a row than its answer and what it expects.
    needs_item: ClassVar[bool] = False
    #: Whether it looks at the probabilities of the request's choices.
    needs_choices: ClassVar[bool] = False
    #: The option that stands behind the scorer's name.
    target: ClassVar[str] = "field"

    #: What repetitions of a row come to: each counts (``mean``), a vote, or a chance of one or of all of k.
    repeats: Repeats = "mean"
    #: Whether a row without an answer is left to the success rate, or is wrong.
    unanswered: Literal["left_out", "wrong"] = Field("left_out", description="left_out or wrong")

    #: The field of the answer that is looked at; None for a scorer that looks at the answer as a whole.
    field: str | None

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | bool | float | None:
        """The verdict on one row; None abstains."""
        raise NotImplementedError

    def ready(self, folder: str | None) -> Self:
        """The scorer with all that it is made of. ``folder``: where files that it names are looked for."""
        return self

    @property
    def metric(self) -> str:
        return self.figures[0]

    @classmethod
    def figures_by(cls, repeats: str) -> tuple[str, ...]:
        """Figures that gates can name, of repetitions that come to one value in this way."""
        reducer = reducer_of(repeats)
        return (REDUCERS[reducer][0],) if reducer else cls.figures

    @property
    def limits(self) -> tuple[float, float]:
        """Least and largest value of a verdict, as its options have it."""
        return self.bounds

    @property
    def costs(self) -> tuple[float, float] | None:
        """What a false yes and a missed one cost; None: the best threshold is that of the best F1."""
        return None

    @property
    def needs_label(self) -> bool:
        """Whether a row must expect a value of the field to be counted."""
        return self.field is not None

    @property
    def unread(self) -> float | None:
        """What an answer that cannot be read counts as; None leaves its row out."""
        return 0.0

    @property
    def unanswered_worth(self) -> float | None:
        """What a row without an answer counts as; None leaves it out."""
        return self.unread if self.unanswered == "wrong" else None

    @property
    def reducer(self) -> str | None:
        """The key of ``REDUCERS`` by which repetitions become one value; None: each counts."""
        return reducer_of(self.repeats)

    @property
    def sha256(self) -> str | None:
        """Names the code of a scorer that is not part of promptmill."""
        return None

    def expected_label(self, expected: JsonObject) -> str | None:
        """The label that a row expects, as JSON, for answers that cannot be read; None for no label."""
        return as_label(expected[self.field]) if self.field is not None and self.field in expected else None


class FieldScorer(Scorer):
    """A scorer that looks at one field."""

    field: str

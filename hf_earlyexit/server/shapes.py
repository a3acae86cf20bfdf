"""What requests may hold and what responses do hold; names and forms of `/predict` and `/rerank` are those of
text-embeddings-inference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator
from pydantic_core import PydanticCustomError

Text = StrictStr
Texts = Annotated[list[Text], Field(min_length=1, max_length=2)]  # one or two
Sequence = Text | Texts
SOME = Field(min_length=1, fail_fast=True)  # of a body of two megabytes, a million errors would take seconds and gigabytes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        """Refuse the first field that is unknown; pydantic would make an error of each."""
        if isinstance(body, dict):
            for name in body:
                if name not in cls.model_fields:
                    words = f"There is no field {name[:40]!r}; expected {', '.join(cls.model_fields)}"
                    raise PydanticCustomError("unknown_field", "{words}", {"words": words})
        return body


class PredictRequest(_Strict):
    """Texts to classify: a text, a pair of two texts, or a list of lists of one or two texts."""

    inputs: Sequence | Annotated[list[Texts], SOME]
    raw_scores: StrictBool = Field(False, description="Logits in place of scores.")
    truncate: StrictBool | None = Field(None, description="False refuses texts that are too long; they are cut otherwise.")
    truncation_direction: Literal["right", "Right"] = "right"


class RerankRequest(_Strict):
    """Texts to put in order."""

    query: Text
    texts: Annotated[list[Text], SOME]
    raw_scores: StrictBool = False
    return_text: StrictBool = False
    truncate: StrictBool | None = None
    truncation_direction: Literal["right", "Right"] = "right"


class ClassifyRequest(_Strict):
    """Rows to classify, each with the layer it left after: texts, pairs of texts or, of image classifiers, pictures."""

    inputs: Annotated[list[Sequence], SOME] | None = None
    images: Annotated[list[Text], SOME] | None = Field(None, description="Picture files in base64.")
    operating_point: StrictStr | None = Field(None, max_length=200, description="Name of a policy; exact: the full model.")
    layer_budget: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = Field(
        None, description="Most layers a row may run."
    )
    deadline: Annotated[float, Field(strict=True, ge=0, le=3600)] | None = Field(
        None, description="Seconds; a row then leaves at the last exit it passed."
    )
    exits: StrictBool = Field(False, description="Tell what every exit says as well; all layers are run for it.")


class Scored(BaseModel):
    """A label and its score."""

    score: float
    label: str


class Ranked(BaseModel):
    """A text's place in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class ExitSaid(BaseModel):
    """What one exit says of a row, and whether the row leaves there."""

    layer: int
    prediction: str
    score: float | None
    threshold: float | None
    verdict: str


class Classified(BaseModel):
    """The answer of one row."""

    label: str | None
    score: float | None
    logits: list[float] | None
    exit_layer: int | None
    num_layers: int
    exit_score: float | None
    reason: str
    form: str
    error: str | None = None
    exits: list[ExitSaid] | None = None


class Problem(BaseModel):
    """Why there is no answer."""

    error: str
    error_type: str

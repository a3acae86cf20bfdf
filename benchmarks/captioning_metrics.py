"""BLEU-1, BLEU-4, ROUGE-L and CIDEr by pycocoevalcap's parts that need no Java, and METEOR where Java is there.

The usual tokeniser of these scores is Stanford's PTBTokenizer, which needs Java. Here captions are lower-cased and cut
into runs of a-z, 0-9 and the apostrophe, so punctuation is dropped, as it is there. CIDEr's document frequencies are
those of the references given: figures of different splits are not to be compared.
"""

from __future__ import annotations

import re
import shutil

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

TOKENISER = "lower case, runs of [a-z0-9']"


def words(caption: str) -> str:
    """The words of a caption with one space between them."""
    return " ".join(re.findall(r"[a-z0-9']+", caption.lower()))


def per_photo(captions: list[str], references: list[list[str]]) -> dict[str, np.ndarray]:
    """ROUGE-L and CIDEr of each caption; their means are the figures of the whole set."""
    written, known = _tables(captions, references)
    return {"ROUGE-L": Rouge().compute_score(known, written)[1], "CIDEr": Cider().compute_score(known, written)[1]}


def score(captions: list[str], references: list[list[str]], meteor: bool = False) -> dict[str, float]:
    """Scores of one caption a photo against all of that photo's references, over the whole set.

    Args:
        captions: `[N]`.
        references: `[N]` lists of one caption or more.
        meteor: adds METEOR, if there is a Java.
    """
    written, known = _tables(captions, references)
    bleu = Bleu(4).compute_score(known, written, verbose=0)[0]
    scores = {"BLEU-1": bleu[0], "BLEU-4": bleu[3]}
    scores |= {name: values.mean() for name, values in per_photo(captions, references).items()}
    if meteor and shutil.which("java"):
        from pycocoevalcap.meteor.meteor import Meteor

        scores["METEOR"] = Meteor().compute_score(known, written)[0]
    return {name: float(value) for name, value in scores.items()}


def _tables(captions: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} photos' references.")
    written = {photo: [words(caption)] for photo, caption in enumerate(captions)}
    return written, {photo: [words(caption) for caption in known] for photo, known in enumerate(references)}

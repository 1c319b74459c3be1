"""The factors that an adapter makes from a prompt."""

from __future__ import annotations

import numpy as np

from ..data.examples import Prompt, encode_prompt
from ..model.adapted import vectors


def factors_of(model, adapter, prompt: Prompt, tokenizer) -> dict[str, np.ndarray]:
    """The factors l of one prompt, {site: float32 [layers, site width]}. Raises ValueError for an adapter without
    factors."""
    ids = encode_prompt(tokenizer, prompt)
    made = vectors(model, adapter, np.array([ids], np.int32), len(ids))
    return {site: np.asarray(factors[:, 0]) for site, factors in made.items()}

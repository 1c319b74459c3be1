"""export_ia3: the factors that PARA makes of one prompt, saved as an (IA)^3 adapter, which PEFT can load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.files import save_adapter
from ..adapters.ia3 import from_factors
from ..adapters.method import acts_everywhere, require_peft_fits
from ..adapters.methods import method_of
from ..backbone.transformer import Transformer
from ..data.examples import Prompt, encode_prompt
from ..io.checks import shorten
from ..io.storage.bucket import BucketPath
from ..model.adapted import vectors


def export_ia3(
    adapter: Adapter,
    model: Transformer,
    prompt: Prompt,
    folder: str | Path | BucketPath,
    *,
    tokenizer,
    base_model: str = "",
) -> None:
    """Writes an (IA)^3 adapter folder that computes what `adapter` computes after this prompt: on the prompt itself and
    on every token that follows it. PARA would make other factors of another prompt.

    Args:
        prompt: a text, or chat messages for the tokenizer's template.
        base_model: where the backbone comes from, for the model card.

    Raises ValueError for an adapter that makes no factors (LoRA), for one of another scope than `all`, for a prompt
    longer than the model's positions, and as save_adapter does.

    >>> export_ia3(adapter, model, "Hello", "runs/ia3", tokenizer=tokenizer)
    >>> type(load_adapter("runs/ia3", model.config).config).__name__
    'Ia3Config'
    """
    method = method_of(adapter.config)
    if method.carries != "factors":
        raise ValueError(
            f"export_ia3: a {method.label} adapter makes {method.carries}, no factors; use save_adapter instead"
        )
    if not acts_everywhere(adapter.config):
        require_peft_fits("export_ia3", method.in_own_format, adapter.config)
    ids, longest = encode_prompt(tokenizer, prompt), model.config.max_positions
    if len(ids) > longest:
        raise ValueError(
            f"export_ia3: the prompt has {len(ids)} tokens; this model has positions for at most {longest}"
        )
    factors_of = vectors(model, adapter, np.array([ids], np.int32), len(ids))
    exported = from_factors({site: factors[:, 0] for site, factors in factors_of.items()}, model.config)
    named = f"`{shorten(prompt, 200).replace('`', ' ')}`" if isinstance(prompt, str) else "a chat"
    card = [
        f"- The factors that a {method.label} adapter makes of one prompt of {len(ids)} tokens: {named}.",
        "- They are valid only after this prompt: PARA makes other factors of another.",
    ]
    save_adapter(exported, folder, base_model=base_model, card=card, example=prompt)

"""export_ia3: PARA's factors for one fixed prompt, which are constants, as an (IA)^3 adapter that PEFT loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.files import NAMES, save_adapter
from ..adapters.ia3 import from_factors
from ..adapters.lora import Lora
from ..backbone.transformer import Transformer
from ..config import require
from ..data.examples import Prompt, encode_prompt
from ..model import vectors


def export_ia3(
    adapter: Adapter, model: Transformer, prompt: Prompt, folder: str | Path, *, tokenizer, base_model: str = ""
) -> None:
    """Writes an (IA)^3 adapter folder that computes what `adapter` computes after this one prompt: on the prompt itself
    and on every token that follows it. After another prompt PARA would make other factors.

    Args:
        prompt: a text, or chat messages for the tokenizer's template.
        base_model: where the backbone comes from, for the model card.

    Raises ValueError for a LoRA adapter, which has no factors, for a prompt that is longer than the model's positions,
    and as save_adapter does.
    """
    if not isinstance(adapter, Adapter) or isinstance(adapter, Lora):
        raise ValueError(
            f"export_ia3: {type(adapter).__name__} is not possible; expected one adapter that makes factors "
            "(PARA, (IA)^3); save_adapter writes LoRA in PEFT's own format"
        )
    ids, longest = encode_prompt(tokenizer, prompt), model.config.max_positions
    require(
        len(ids) <= longest, "export_ia3: tokens of the prompt", len(ids), f"at most {longest}, the model's positions"
    )
    made = vectors(model, adapter, np.array([ids], np.int32), len(ids))
    exported = from_factors({site: factors[:, 0] for site, factors in made.items()}, model.config)
    name = NAMES[type(adapter.config)][0] if type(adapter.config) in NAMES else type(adapter).__name__
    card = [f"The factors that a {name} adapter makes of one prompt of {len(ids)} tokens. They hold after that alone."]
    save_adapter(exported, folder, base_model=base_model, card=card)

"""The code of docs/foreign.md."""

import re
from pathlib import Path

import numpy as np
import pytest

from para_jax import adapter_of, set_adapter

TUNIX, OWN = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "docs/foreign.md").read_text(), re.M | re.S
)


def test_a_model_of_ones_own_takes_an_adapter():
    names = {}
    exec(OWN, names)
    before, model = names["logits"], names["mine"]
    adapter = adapter_of(model)
    for up in adapter.up.values():
        up[...] += 0.1
    set_adapter(model, adapter)
    tokens, ends = names["tokens"], np.array([3, 5])
    after = model(tokens, np.tile(np.arange(6), (2, 1)), prompt_end=ends)
    assert before.shape == (2, 6, 256) and np.abs(np.asarray(after - before)).max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_tunix_takes_one_too(tmp_path, monkeypatch):
    pytest.importorskip("tunix")
    from tunix_models import tunix_model

    monkeypatch.chdir(tmp_path)
    exec(TUNIX, {"model": tunix_model("llama3")})
    assert (tmp_path / "runs/tunix/adapter_config.json").exists()

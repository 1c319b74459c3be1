"""MaxText's own Transformer under the hooks. MaxText needs Python 3.12, JAX 0.11 and hundreds of packages, so this runs
in an environment of its own:

pip install -e '.[test]' 'jax>=0.11' && pip install --no-deps maxtext==0.2.5 aqtp google-tunix==0.1.7
pip install omegaconf pillow google-metrax perfetto pandas
pytest -n 0 -m slow tests/foreign/test_maxtext.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_models import strong

from para_jax import Ia3Config, LoraConfig, ParaConfig, adapter_of, attach, forward, init_adapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("maxtext")
from maxtext_model import VOCAB, maxtext_model, own_model  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, VOCAB, (8, 12)).astype(np.int32)
POSITIONS, SEGMENTS = np.tile(np.arange(12), (8, 1)), np.ones((8, 12), np.int32)
ENDS = np.array([4, 2, 7, 5, 1, 3, 6, 4])
METHODS = {"para": ParaConfig(r=4), "lora": LoraConfig(r=4), "ia3": Ia3Config()}
scans = pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])


@scans
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_are_those_of_our_backbone(scan, method, tmp_path):
    model, mesh = maxtext_model(tmp_path, scan)
    own = own_model(model, scan)
    with mesh:
        plain = model(TOKENS, POSITIONS, SEGMENTS, enable_dropout=False)
        np.testing.assert_allclose(plain, forward(own, None, TOKENS, 5), atol=1e-4)
        adapter = strong(init_adapter(METHODS[method], own.config))
        attach(model, adapter, config=own.config)

        def loss(model):
            logits = model(TOKENS, POSITIONS, SEGMENTS, enable_dropout=False, prompt_end=ENDS)
            return (logits**2).mean(), logits

        values = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)
        (_, logits), grads = nnx.jit(values)(model)
    wanted = forward(own, adapter, TOKENS, ENDS + 1)
    assert jnp.abs(wanted - plain).max() > 0.1
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    ours = jax.grad(lambda a: (forward(own, a, TOKENS, ENDS + 1) ** 2).mean())(adapter)
    assert optax.global_norm(grads) == pytest.approx(float(optax.global_norm(ours)), rel=1e-3)


@scans
def test_a_step_of_tunix_s_sft_over_maxtext_s_adapter_for_it_trains_the_adapter_alone(scan, tmp_path, monkeypatch):
    from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS
    from maxtext.integration.tunix.tunix_adapter import TunixMaxTextAdapter
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    from para_jax.foreign.tunix import sft

    monkeypatch.setitem(HF_MODEL_CONFIGS, "default", HF_MODEL_CONFIGS["llama3.1-8b"])  # read for vLLM alone
    base, mesh = maxtext_model(tmp_path, scan)
    own = own_model(base, scan)
    with mesh:
        model = attach(TunixMaxTextAdapter(base), ParaConfig(r=4), config=own.config)
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        mask = np.arange(12)[None] > ENDS[:, None]
        trainer = sft(PeftTrainer(model, optax.sgd(1.0), TrainingConfig(eval_every_n_steps=100, max_steps=1)))
        trainer.train([TrainingInput(input_tokens=TOKENS, input_mask=mask)])
        after = nnx.state(model, nnx.Param)
    changed = {
        path
        for (path, a), b in zip(nnx.to_flat_state(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(a[...], b)
    }
    assert changed and all("para" in path for path in changed)

    def loss(adapter):
        logp = jax.nn.log_softmax(forward(own, adapter, TOKENS, ENDS + 1)[:, :-1])
        return -(jnp.take_along_axis(logp, TOKENS[:, 1:, None], -1)[..., 0] * mask[:, 1:]).sum() / mask[:, 1:].sum()

    adapter = init_adapter(ParaConfig(r=4), own.config)
    wanted = jax.tree.map(lambda a, g: a - g, adapter, jax.grad(loss)(adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), adapter_of(model), wanted)

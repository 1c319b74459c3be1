"""Tunix's Sampler on an attached model: every sampled token's log-probability is that of the teacher-forced pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import strong
from long_cases import slow

from para_jax import Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, pick, stack_adapters
from para_jax.foreign import adapter_of, attach, set_adapter

pytest.importorskip("tunix")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from tunix.generate.sampler import CacheConfig, Sampler  # noqa: E402
from tunix.generate.tokenizer_adapter import TokenizerAdapter  # noqa: E402
from tunix.sft import utils  # noqa: E402
from tunix_models import HEAD, LAYERS, VOCAB, number_tokenizer, own_model, tunix_model  # noqa: E402

PROMPTS = [np.random.default_rng(2).integers(3, VOCAB, n).astype(np.int32) for n in (4, 7, 1, 6)]
INDEX = [2, -1, 0, 1]
CASES = {
    "para": ("llama3", ParaConfig(r=4)),
    "response": ("llama3", ParaConfig(r=4, scope="response")),
    "prompt": ("llama3", ParaConfig(r=4, scope="prompt")),
    "lora": ("llama3", LoraConfig(r=4)),
    "ia3": ("llama3", Ia3Config()),
    "gemma_mqa": ("gemma_mqa", ParaConfig(r=4)),
    "gemma3": ("gemma3", ParaConfig(r=4)),
    "gemma4": ("gemma4", ParaConfig(r=4)),
}


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def sampled(model, steps=8, **options):
    c = model.config
    cache = CacheConfig(cache_size=40, num_layers=LAYERS, num_kv_heads=c.num_kv_heads, head_dim=HEAD)
    texts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    # Tunix takes a sampled 0 for padding and masks it.
    return Sampler(model, TokenizerAdapter(number_tokenizer()), cache)(
        texts, max_generation_steps=steps, eos_tokens=[10**6], forbidden_tokens=[0], return_logprobs=True, **options
    )


def logps(logits, row, prompt):
    logits = logits.at[:, 0].set(-jnp.inf)
    return jax.nn.log_softmax(logits)[np.arange(prompt - 1, len(row) - 1), row[prompt:]]


def rows_of(out):
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        yield np.concatenate([[1], prompt, tokens]).astype(np.int32), len(prompt) + 1  # Tunix adds the first token


@pytest.mark.parametrize("case", [slow(case) if case == "gemma4" else case for case in CASES])
def test_decoding_equals_the_teacher_forced_pass(case):
    name, method = CASES[case]
    model = tunix_model(name)
    attach(model, method)
    own = None if name == "gemma4" else own_model(model, name)
    adapter = strong(adapter_of(model), scale=0.2)
    set_adapter(model, adapter)
    out = sampled(model)
    for (row, prompt), found in zip(rows_of(out), out.logprobs, strict=True):
        if own is None:  # our own backbone has no Gemma 4
            mask = jnp.ones((1, len(row)), bool)
            call = utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask)
            logits = model(row[None], *call, prompt_end=np.array([prompt - 1]))[0][0]
        else:
            logits = forward(own, adapter, row[None], prompt)[0]
        np.testing.assert_allclose(found, logps(logits, row, prompt), atol=1e-4)


@pytest.mark.parametrize("case", ["para", "lora", "ia3"])
def test_the_sampler_serves_a_batch_of_tenants(case):
    model = tunix_model("llama3")
    own = own_model(model, "llama3")
    stack = stack_adapters([strong(init_adapter(CASES[case][1], own.config), seed=i) for i in range(3)])
    attach(model, pick(stack, INDEX))
    out = sampled(model)
    for i, ((row, prompt), found) in enumerate(zip(rows_of(out), out.logprobs, strict=True)):
        logits = forward(own, pick(stack, INDEX[i : i + 1]), row[None], prompt)[0]
        np.testing.assert_allclose(found, logps(logits, row, prompt), atol=1e-4)


def test_beam_search_carries_each_beams_adjustment():
    model = tunix_model("llama3")
    own = own_model(model, "llama3")
    adapter = strong(init_adapter(ParaConfig(r=4), own.config), scale=0.2)
    attach(model, adapter)
    greedy, beams = sampled(model, 4), sampled(model, 4, beam_size=3)

    def score(out):
        each = [logps(forward(own, adapter, row[None], prompt)[0], row, prompt).sum() for row, prompt in rows_of(out)]
        return np.array(each)

    assert (score(beams) >= score(greedy) - 1e-4).all()

"""Tunix's trainers over an attached model: only the adapter learns, and it learns what our own driver would."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_models import strong
from jax.sharding import Mesh
from long_cases import slow

from para_jax import ParaConfig, forward, init_adapter, load_adapter, save_adapter
from para_jax.foreign import LeftPadded, adapter_of, attach

pytest.importorskip("tunix")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

import orbax.checkpoint as ocp  # noqa: E402
from tunix.rl import rl_cluster as rc  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner  # noqa: E402
from tunix.rl.rollout.base_rollout import RolloutConfig  # noqa: E402
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, compute_logps  # noqa: E402
from tunix.sft.dpo.dpo_trainer import TrainingInput as Pairs  # noqa: E402
from tunix.sft.metrics_logger import Mode  # noqa: E402
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput  # noqa: E402
from tunix_models import number_tokenizer, own_model, tunix_model  # noqa: E402

from para_jax.foreign.tunix import EngineRollout, ParaRollout, sft, sft_inputs, sft_loss  # noqa: E402

P, C = 8, 4


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def arrays(model):
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))[0]
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def changed(before, model):
    return {path for path, leaf in arrays(model).items() if (leaf != before[path]).any()}


def copies(steps, rows=8, length=12, seed=0):
    """The completion repeats the prompt's last token."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        tokens, learn = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for i, prompt in enumerate(rng.integers(3, 7, rows)):
            tokens[i, :prompt] = rng.integers(3, 20, prompt)
            tokens[i, prompt : prompt + 4] = tokens[i, prompt - 1]
            learn[i, prompt : prompt + 4] = True
        yield TrainingInput(input_tokens=tokens, input_mask=learn)


def trainer_of(model, folder, steps):
    options = ocp.CheckpointManagerOptions(save_interval_steps=10)
    config = TrainingConfig(
        eval_every_n_steps=10**6, max_steps=steps, checkpoint_root_directory=str(folder), checkpointing_options=options
    )
    return sft(PeftTrainer(model, optax.adamw(3e-2), config))


def test_sft_has_the_losses_of_our_own_backbone_and_resumes_with_the_same_bits(tmp_path):
    model = attach(tunix_model("llama3", "BLOCK"), ParaConfig(r=8))
    own, before = own_model(model, "llama3"), arrays(model)
    adapter, optimizer = adapter_of(model), optax.adamw(3e-2)
    trainer = trainer_of(model, tmp_path / "run", 20)
    trainer.train(copies(20))
    losses = trainer.metrics_logger.get_metric_history(trainer.metrics_prefix, "loss", Mode.TRAIN)
    assert changed(before, model) and all("para" in path for path in changed(before, model))

    def loss(adapter, x):
        logits = forward(own, adapter, x["input_tokens"], x["prompt_end"] + 1)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), x["input_tokens"][:, 1:, None], -1)[..., 0]
        return -jnp.sum(logp * x["input_mask"][:, 1:]) / x["input_mask"].sum()

    @jax.jit
    def step(adapter, state, x):
        value, grads = jax.value_and_grad(loss)(adapter, x)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = optimizer.init(adapter)
    for batch, theirs in zip(copies(20), losses, strict=True):
        adapter, state, value = step(adapter, state, sft_inputs(batch, 0))
        np.testing.assert_allclose(theirs, value, atol=1e-3)
    assert losses[-1] < losses[0] - 0.5
    test = sft_inputs(next(copies(1, rows=32, seed=9)), 0)
    trained = sft_loss(model, **test)
    np.testing.assert_allclose(trained, loss(adapter, test), atol=1e-3)

    resumed = attach(tunix_model("llama3", "BLOCK"), ParaConfig(r=8))
    trainer_of(resumed, tmp_path / "run", 20)  # restores step 20
    np.testing.assert_array_equal(sft_loss(resumed, **test), trained)
    save_adapter(adapter_of(resumed), tmp_path / "adapter")
    served = load_adapter(tmp_path / "adapter", own.config)
    np.testing.assert_allclose(loss(served, test), trained, atol=1e-5)


def pairs(steps, rows=4, seed=0):
    """The chosen answer repeats the prompt's last token, the rejected one is random."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        prompt, chosen, rejected = (np.zeros((rows, n), np.int32) for n in (P, C, C))
        for i, length in enumerate(rng.integers(3, P, rows)):
            prompt[i, P - length :] = rng.integers(3, 20, length)
            chosen[i, :3], rejected[i, :3] = prompt[i, -1], rng.integers(20, 40, 3)
        ids = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        masks = {f"{name}_mask": (tokens != 0).astype(np.int32) for name, tokens in ids.items()}
        yield Pairs(**{f"{name}_ids": tokens for name, tokens in ids.items()}, **masks)


def test_dpo_prefers_the_chosen_answers_of_prompts_it_has_not_seen():
    model, reference = tunix_model("llama3"), tunix_model("llama3")
    own = own_model(model, "llama3")
    attach(model, ParaConfig(r=8), prompts=LeftPadded(P))
    before = arrays(model)
    config = DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=40, beta=0.5)
    trainer = DPOTrainer(model, reference, optax.adamw(1e-2), config)
    margins, note = [], trainer._post_process_train_step
    trainer._post_process_train_step = lambda aux: (margins.append(float(aux["rewards/margin"])), note(aux))
    trainer.train(pairs(40))
    assert changed(before, model) and all("para" in path for path in changed(before, model))
    assert np.mean(margins[-5:]) > np.mean(margins[:5]) + 0.5

    x = trainer._prepare_inputs(next(pairs(1, rows=32, seed=5)))
    inputs = x.input_ids, x.positions, x.attention_mask, x.logits_to_keep, x.completion_mask
    (found, rejected), of_reference = (compute_logps(one, *inputs) for one in (model, reference))
    assert np.mean(found - of_reference[0] > rejected - of_reference[1]) >= 0.8
    for row, theirs in zip(np.asarray(x.input_ids[:4]), found, strict=False):
        start = int(np.argmax(row != 0))
        logits = forward(own, adapter_of(model), row[None, start : P + 3], P - start)[0]
        of_answer = jax.nn.log_softmax(logits)[np.arange(P - start - 1, P - start + 2), row[P : P + 3]]
        np.testing.assert_allclose(of_answer.sum(), theirs, atol=1e-4)


def reward(prompts, completions, **kwargs):
    """The share of tokens under 40."""
    return [
        float(np.mean([token.isdigit() and int(token) < 40 for token in text.split()] or [0])) for text in completions
    ]


def grpo(model, rollout, mesh, other=None, steps=6, **options):
    reference = tunix_model("llama3")
    nnx.update(reference, jax.tree.map(lambda a: a, nnx.state(model, nnx.Not(nnx.LoRAParam))))
    roles = {rc.Role.ACTOR: mesh, rc.Role.REFERENCE: mesh, rc.Role.ROLLOUT: other or mesh}
    training = rc.RLTrainingConfig(actor_optimizer=optax.adamw(3e-2), eval_every_n_steps=10**6, max_steps=steps)
    rollout_config = RolloutConfig(
        max_tokens_to_generate=6, max_prompt_length=P, kv_cache_size=32, temperature=1.0, return_logprobs=True
    )
    cluster = rc.RLCluster(
        actor=model,
        reference=reference,
        tokenizer=number_tokenizer(),
        cluster_config=rc.ClusterConfig(
            role_to_mesh=roles, rollout_engine=rollout, training_config=training, rollout_config=rollout_config
        ),
    )
    config = GRPOConfig(num_generations=8, beta=0.02, policy_loss_fn="para_grpo", **options)
    learner = GRPOLearner(cluster, config, reward_fns=reward)
    scores = []
    learner.metric_fns = [lambda prompts, completions, rewards, advantages, **_: scores.append(np.mean(rewards)) or {}]
    rng = np.random.default_rng(0)
    texts = [[" ".join(map(str, rng.integers(3, 120, int(n)))) for n in rng.integers(2, 6, 2)] for _ in range(steps)]
    before = arrays(model)
    learner.train([{"prompts": np.array(of_step)} for of_step in texts])
    trained = cluster.actor_trainer.model
    assert changed(before, trained) and all("para" in path for path in changed(before, trained))
    return cluster, scores


def one_device(i=0):
    return Mesh(np.array(jax.devices()[i : i + 1]).reshape(1, 1), ("fsdp", "tp"))


@pytest.mark.parametrize("how", ["shared", "bfloat16, copied", slow("two iterations")])
def test_grpo_trains_the_adapter_and_gives_it_to_the_rollout(how):
    model = tunix_model("llama3")
    if "bfloat16" in how:
        nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(model)))
    attach(model, ParaConfig(r=8))
    other = one_device(1) if "copied" in how else None
    cluster, _ = grpo(model, ParaRollout, one_device(), other, num_iterations=2 if "two" in how else 1)
    held, trained = (nnx.state(one, nnx.LoRAParam) for one in (cluster.rollout.model(), cluster.actor_trainer.model))
    for one, two in zip(jax.tree.leaves(held), jax.tree.leaves(trained), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, two)


def test_our_engine_is_the_rollout_with_the_trainers_log_probabilities():
    model = tunix_model("llama3")
    own = own_model(model, "llama3")
    attach(model, strong(init_adapter(ParaConfig(r=8), own.config)))
    seen, generate = [], EngineRollout.generate

    class Noted(EngineRollout):
        def generate(self, prompts, rollout_config, **kwargs):
            out = generate(self, prompts, rollout_config, **kwargs)
            tokens = np.zeros((len(prompts), 6), np.int32)
            for row, answer in zip(tokens, out.tokens, strict=True):
                row[: len(answer)] = answer
            theirs = self.get_per_token_logps(jnp.asarray(out.left_padded_prompt_tokens), jnp.asarray(tokens))
            seen.extend(zip(theirs, out.logprobs, out.tokens, strict=True))
            return out

    grpo(model, partial(Noted, backbone=own), one_device())
    assert len(seen) == 6 * 2 * 8
    for theirs, ours, tokens in seen:
        assert len(ours) == len(tokens) <= 6 and (len(tokens) == 6 or tokens[-1] == 2)
        before_pad = np.argmax(np.append(tokens, 0) == 0)  # a sampled 0 is padding to Tunix, and masked from there on
        np.testing.assert_allclose(theirs[:before_pad], ours[:before_pad], atol=1e-4)
    assert any(tokens[-1] == 2 for _, _, tokens in seen)

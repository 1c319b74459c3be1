"""Tunix's trainers (extra `tunix`) over an attached model: SFT, DPO and GRPO. The only file that imports Tunix.

Importing it registers the policy loss `para_grpo`, for GRPOConfig(policy_loss_fn="para_grpo"). Rollouts run by
ParaRollout or EngineRollout.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common, function_registry
from tunix.rl.rollout.base_rollout import BaseRollout, CacheConfig, RolloutConfig, RolloutOutput
from tunix.rl.rollout.vanilla_rollout import VanillaRollout
from tunix.sft import utils

from ..adapters.bank import AdapterBank
from ..backbone.transformer import Transformer
from ..serving.engine import Engine
from ..serving.request import Request
from .attach import adapter_of
from .prompts import prompt_width

Trainer = TypeVar("Trainer")
POLICY = "policy"


def sft(trainer: Trainer, *, pad_id: int = 0) -> Trainer:
    """A PeftTrainer whose batches say where prompts end: TrainingInput's input_mask is 1 from the first token to learn
    on. Packed batches are not told apart from others: leave packing off.

    >>> sft(PeftTrainer(model, optimizer, config)).train(batches)  # doctest: +SKIP
    """
    return trainer.with_gen_model_input_fn(lambda batch: sft_inputs(batch, pad_id)).with_loss_fn(sft_loss)  # type: ignore


def sft_inputs(batch: Any, pad_id: int) -> dict[str, jax.Array]:
    real = batch.input_tokens != pad_id
    first = jnp.argmax(batch.input_mask, axis=1).astype(jnp.int32)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
        "prompt_end": jnp.maximum(first - 1, 0),  # a row with nothing to learn has no loss
    }


def sft_loss(model, input_tokens, input_mask, positions, attention_mask, prompt_end) -> jax.Array:
    """Tunix's default loss: the mean over the tokens to learn."""
    logits, _ = model(input_tokens, positions, None, attention_mask, prompt_end=prompt_end)
    losses = -common.selective_log_softmax(logits[:, :-1], input_tokens[:, 1:])
    mask = input_mask[:, 1:].astype(jnp.float32)
    return jnp.sum(losses * mask) / jnp.maximum(mask.sum(), 1)


@function_registry.register_policy_loss_fn("para_grpo")
def para_grpo(model, train_example, algo_config, pad_id, eos_id, **kwargs):
    """Tunix's GRPO loss, with the prompts' width from the batch."""
    width = train_example.prompt_ids.shape[1]
    if width == 0:  # where Tunix packs, prompts and completions are in one row
        raise ValueError("max_seq_token_per_tpu: packed rows hold several prompts; leave it out for PARA")
    with prompt_width(width):
        return algo_core.grpo_loss_fn(model, train_example, algo_config, pad_id, eos_id, **kwargs)


def token_logps(model: nnx.Module, prompt_tokens, completion_tokens, pad_id: int, eos_id: int) -> jax.Array:
    """The log-probability of each completion token [batch, C] under an attached model."""
    graph, state = nnx.split(model)
    with prompt_width(prompt_tokens.shape[1]):
        return common.compute_per_token_logps(  # pyright: ignore[reportReturnType]
            graph, state, prompt_tokens, completion_tokens, pad_id=pad_id, eos_id=eos_id
        )


class ParaRollout(VanillaRollout):
    """Tunix's own rollout for attached models: ClusterConfig(rollout_engine=ParaRollout). It knows where prompts end,
    and a weight sync keeps the adapter in float32 next to a bfloat16 model, where VanillaRollout's fails."""

    def __init__(self, rollout_actor, tokenizer, mesh, rollout_config: RolloutConfig):
        c = rollout_actor.config
        cache = CacheConfig(rollout_config.kv_cache_size, c.num_layers, c.num_kv_heads, c.head_dim)
        super().__init__(rollout_actor, tokenizer, cache)

    def get_per_token_logps(self, prompt_tokens, completion_tokens):
        return token_logps(self.model(), prompt_tokens, completion_tokens, self.pad_id(), self.eos_id())

    def update_params(self, params, filter_types=None):
        held = self._sampler.transformer_state
        own = nnx.filter_state(held, nnx.LoRAParam)
        moved = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, own)
        self._sampler.transformer_state = nnx.merge_state(nnx.filter_state(held, nnx.Not(nnx.LoRAParam)), moved)


class EngineRollout(BaseRollout):
    """para_jax's Engine as the rollout, over a backbone of its own with the policy's weights:
    ClusterConfig(rollout_engine=functools.partial(EngineRollout, backbone=load_backbone(...))).

    Each batch is drawn from the policy's adapter as it is then. Answers include the end token and its log-probability.
    """

    def __init__(
        self,
        rollout_actor,
        tokenizer,
        mesh,
        rollout_config: RolloutConfig,
        *,
        backbone: Transformer,
        slots: int = 8,
        **options: Any,
    ):
        """
        Args:
            tokenizer: Tunix's adapter of a Hugging Face tokenizer.
            slots, options: of Engine.
        """
        self.actor, self.tokenizer = rollout_actor, tokenizer
        length = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
        bank = AdapterBank.holding({POLICY: adapter_of(rollout_actor)}, backbone.config)  # pyright: ignore
        ends = rollout_config.eos_tokens or [self.eos_id()]
        options = {"stop_ids": ends, "max_logprobs": 1, **options}
        self.engine = Engine(backbone, bank, tokenizer.tokenizer, slots=slots, max_length=length, **options)

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs) -> RolloutOutput:
        assert self.engine.bank is not None
        self.engine.bank.replace(POLICY, adapter_of(self.actor))  # pyright: ignore[reportArgumentType]
        ids = [self.prompt_ids(text) for text in prompts]
        for number, prompt in enumerate(ids):
            self.engine.submit(
                Request(
                    prompt,
                    tenant=POLICY,
                    max_new_tokens=rollout_config.max_tokens_to_generate,
                    temperature=rollout_config.temperature,
                    top_p=rollout_config.top_p or 1.0,
                    top_k=max(rollout_config.top_k or 0, 0),
                    seed=None
                    if rollout_config.seed is None
                    else int(jax.random.bits(rollout_config.seed)) // 2 + number,
                    id=number,
                    logprobs=0,
                    keep_end=True,
                )
            )
        answers = sorted(self.engine.run(), key=lambda answer: answer.id)  # pyright: ignore
        if errors := [answer.error for answer in answers if answer.error]:
            raise ValueError(f"{len(errors)} of {len(answers)} rollouts failed; the first: {errors[0]}")
        return RolloutOutput(
            text=[self.tokenizer.decode(answer.tokens) for answer in answers],
            logits=None,  # pyright: ignore[reportArgumentType]
            tokens=[np.array(answer.tokens, np.int32) for answer in answers],
            left_padded_prompt_tokens=left_padded(ids, rollout_config.max_prompt_length, self.pad_id()),
            logprobs=[np.array([record.logprob for record in answer.logprobs], np.float32) for answer in answers],
        )

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """As Tunix's Sampler makes them."""
        start = [self.tokenizer.bos_id()] if self.tokenizer.bos_id() else []
        return tuple(self.tokenizer.dedup_bos_ids(start + list(self.tokenizer.encode(text))))

    def get_per_token_logps(self, prompt_tokens, completion_tokens):
        return token_logps(self.actor, prompt_tokens, completion_tokens, self.pad_id(), self.eos_id())

    def update_params(self, params, filter_types=None):
        nnx.update(self.actor, params)

    def pad_id(self) -> int:
        return self.tokenizer.pad_id()

    def eos_id(self) -> int:
        return self.tokenizer.eos_id()

    def model(self):
        return self.actor


def left_padded(rows: list[tuple[int, ...]], width: int, pad_id: int) -> np.ndarray:
    if longest := max((len(row) for row in rows if len(row) > width), default=0):
        raise ValueError(f"max_prompt_length is {width}; a prompt has {longest} tokens")
    return np.array([[pad_id] * (width - len(row)) + list(row) for row in rows], np.int32)

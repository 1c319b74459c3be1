"""GRPO by Tunix on SmolLM2-135M: PARA, LoRA of its size and (IA)^3 learn to answer sums with the number alone.

    python scripts/experiments/tunix_grpo.py para --steps 60 --output runs/grpo/para.json

The reward is 0 for a wrong sum, else 1 divided by the words of the answer: the number alone gets 1. Rollouts come from
our Engine.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tunix.rl import rl_cluster as rc
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix_model import in_tunix

from para_jax import (
    AdapterBank,
    Engine,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    Request,
    adapter_of,
    attach,
    load_backbone,
    load_tokenizer,
    save_adapter,
)
from para_jax.adapters.adapter import count_parameters
from para_jax.foreign import compare_backbones
from para_jax.foreign.tunix import EngineRollout

METHODS = {"para": (ParaConfig(r=12), 1e-4), "lora": (LoraConfig(r=18), 3e-4), "ia3": (Ia3Config(), 1e-3)}
PROMPT, ANSWER = 20, 6


def questions(count: int, seed: int) -> list[str]:
    pairs = np.random.default_rng(seed).integers(1, 50, (count, 2))
    return [f"5 + 3 = 8, {a} + {b} =" for a, b in pairs]


def reward(prompts, completions, **_) -> list[float]:
    def one(prompt: str, answer: str) -> float:
        right = sum(map(int, re.findall(r"\d+", prompt)[-2:]))
        number = re.match(r"\s*(\d+)", answer)
        return (number is not None and int(number[1]) == right) / max(1, len(answer.split()))

    return [one(*pair) for pair in zip(prompts, completions, strict=True)]


def held_out(own, adapter, tokenizer) -> float:
    """The mean reward of greedy answers to questions that training has not seen."""
    texts = questions(128, seed=10**6)
    engine = Engine(
        own, AdapterBank.holding({"policy": adapter}, own.config), tokenizer, slots=16, max_length=PROMPT + ANSWER
    )
    for i, text in enumerate(texts):
        engine.submit(Request(tuple(tokenizer(text)["input_ids"]), tenant="policy", max_new_tokens=ANSWER, id=i))
    return float(np.mean(reward(texts, [answer.text for answer in sorted(engine.run(), key=lambda one: one.id)])))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config, rate = METHODS[args.method]
    own, tokenizer = load_backbone("smollm2-135m"), load_tokenizer("smollm2-135m")
    model = in_tunix(own)
    gap = compare_backbones(model, own, np.array([tokenizer(questions(1, 0)[0])["input_ids"]]))
    attach(model, config, config=own.config)
    before = held_out(own, adapter_of(model), tokenizer)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rc.RLCluster(
        actor=model, tokenizer=tokenizer,
        cluster_config=rc.ClusterConfig(
            role_to_mesh={rc.Role.ACTOR: mesh, rc.Role.REFERENCE: mesh, rc.Role.ROLLOUT: mesh},
            rollout_engine=partial(EngineRollout, backbone=own, slots=16),
            training_config=rc.RLTrainingConfig(
                actor_optimizer=optax.adamw(args.rate or rate, weight_decay=0.0), eval_every_n_steps=10**6,
                max_steps=args.steps,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=ANSWER, max_prompt_length=PROMPT, temperature=1.0,
                eos_tokens=[tokenizer.eos_token_id],
            ),
        ),
    )  # fmt: skip
    learner = GRPOLearner(
        cluster, GRPOConfig(num_generations=8, beta=0.0, policy_loss_fn="para_grpo"), reward_fns=reward
    )
    rewards, times = [], [time.time()]

    def note(prompts, completions, **of_step):
        rewards.append(float(np.mean(of_step["rewards"])))
        times.append(time.time())
        print(f"step {len(rewards)} reward {rewards[-1]:.3f} {times[-1] - times[-2]:.1f} s", flush=True)
        return {}

    learner.metric_fns = [note]
    texts = questions(4 * args.steps, seed=args.seed)
    learner.train([{"prompts": np.array(texts[4 * i : 4 * i + 4])} for i in range(args.steps)])
    adapter = adapter_of(cluster.actor_trainer.model)  # RLCluster has moved the model to its mesh
    save_adapter(adapter, args.output.with_suffix(""))
    found = {
        "method": args.method,
        "parameters": count_parameters(adapter),
        "rate": args.rate or rate,
        "seed": args.seed,
        "backbone_gap": gap,
        "reward_before": before,
        "reward_after": held_out(own, adapter, tokenizer),
        "rewards": rewards,
        "seconds_per_step": float(np.median(np.diff(times))),
    }
    args.output.write_text(json.dumps(found, indent=1))
    print({name: value for name, value in found.items() if name != "rewards"})


if __name__ == "__main__":
    main()

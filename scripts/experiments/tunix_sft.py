"""SFT of SmolLM2-135M by Tunix's PeftTrainer and by `para-jax train`, with the same batches: losses and test scores.

python scripts/experiments/tunix_sft.py data/banking77 --output runs/tunix_sft
"""

import argparse
import json
from pathlib import Path

import numpy as np
import optax
from tunix.sft.metrics_logger import Mode
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix_model import in_tunix

from para_jax import (
    EvalOptions,
    ParaConfig,
    adapter_of,
    attach,
    evaluate,
    load_adapter,
    load_backbone,
    load_config,
    load_tokenizer,
    train,
)
from para_jax.data.batches import Plan, collate, example_lengths, plan_buckets
from para_jax.data.training_data import load_training_data
from para_jax.foreign.tunix import sft


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = load_config(None, [
        "backbone.source=smollm2-135m", f"data.train={args.data / 'train.jsonl'}", f"output_dir={args.output / 'ours'}",
        "adapter.r=12", "data.buckets=1", f"train.max_steps={args.steps}", f"train.learning_rate={args.rate}",
        "train.schedule=constant", "train.warmup_ratio=0", "logging.every=1", "logging.report_to=[]",
        "runtime.allow_cpu=true",
    ])  # fmt: skip
    ours = train(config)
    own, tokenizer = load_backbone("smollm2-135m"), load_tokenizer("smollm2-135m")
    examples = load_training_data(config.data, tokenizer).examples
    buckets = plan_buckets(examples, 1)
    plan = Plan(example_lengths(examples), buckets=buckets, rows=8, seed=config.seed)
    batches = []
    for i in range(args.steps):
        _, chosen = plan.batch_indices(i)
        batch = collate([examples[j] for j in chosen], buckets[0], 8)
        place = np.arange(buckets[0].length)[None]
        answer = (place >= batch.prompt_length[:, None]) & (place < batch.length[:, None])
        # Tunix's padding is marked by its id, which prompts do not hold
        tokens = np.where(place < batch.length[:, None], batch.tokens, 0)
        batches.append(TrainingInput(input_tokens=tokens, input_mask=answer))
    model = attach(in_tunix(own), ParaConfig(r=12), config=own.config, backbone=own)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.rate, weight_decay=0.0))
    trainer = sft(PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**6, max_steps=args.steps)))
    trainer.train(batches)
    history = trainer.metrics_logger.get_metric_history(trainer.metrics_prefix, "loss", Mode.TRAIN)
    losses = [float(loss) for loss in history]
    adapters = {"ours": load_adapter(ours.output_dir / "adapter", own.config), "tunix": adapter_of(model)}
    scores = evaluate(
        own, adapters, f"{args.data}/test.jsonl:exact_match", tokenizer=tokenizer, options=EvalOptions(limit=500)
    )
    rows = [json.loads(line) for line in (ours.output_dir / "metrics.jsonl").open()]
    own_losses = [row["loss"] for row in rows if "loss" in row]
    print(scores.table())
    found = {"losses": {"ours": own_losses, "tunix": losses}, "scores": scores.table()}
    found["largest_difference"] = float(np.abs(np.subtract(own_losses[:20], losses[:20])).max())
    (args.output / "found.json").write_text(json.dumps(found, indent=1))
    print({name: value for name, value in found.items() if name != "losses"})


if __name__ == "__main__":
    main()

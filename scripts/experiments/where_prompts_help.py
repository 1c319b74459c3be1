"""Which factors of a trained PARA adapter have to come from the example's own prompt?

    python scripts/experiments/where_prompts_help.py --data data/banking77/test.jsonl --adapters DIR DIR --output A.json

Prints the loss of the first examples if some of their factors are made from another example's prompt, as `para-jax
evaluate --shuffle-prompts` does with all of them: those of all layers and sites, of one site, or of a third of the
layers. The rise of the loss is what these factors owe to the prompt. Medians over the adapters, with their range.
"""

import argparse
from pathlib import Path
from statistics import median

import numpy as np

from para_jax import load_adapter, load_backbone, load_config, load_tokenizer, log_to_stderr
from para_jax.adapters.adapter import Factors
from para_jax.data.batches import collate, full_batches, plan_buckets
from para_jax.data.examples import Example
from para_jax.data.records import load_records
from para_jax.evaluation.scoring import other_prompts
from para_jax.evaluation.tasks import EvalTask, encode_task
from para_jax.io.record_file import write_record
from para_jax.model.adapted import Adjustments, adjustments_for
from para_jax.runtime.devices import describe_devices, library_versions
from para_jax.training.step import eval_nll

ROWS = 16


def parts(layers: int, sites: tuple[str, ...]) -> dict:
    """By name, the layers and the sites with factors from another prompt."""
    third, everywhere = np.array_split(np.arange(layers), 3), range(layers)
    named = {f"layers {part[0]} to {part[-1]}": (set(part.tolist()), set(sites)) for part in third}
    of_sites = {site: (set(everywhere), {site}) for site in sites}
    return {"none": (set(), set()), "all": (set(everywhere), set(sites)), **of_sites, **named}


def swapped(own: Adjustments, other: Adjustments, layers: set[int], sites: set[str]) -> Adjustments:
    """The factors `own`, with those of `other` at these layers and sites."""
    mixed = []
    for layer, (mine, theirs) in enumerate(zip(own.layers, other.layers, strict=True)):
        chosen = sites if layer in layers else set()
        distance = {site: (theirs if site in chosen else mine).distance[site] for site in mine.distance}
        mixed.append(Factors(distance))
    return own._replace(layers=tuple(mixed))


def losses(model, adapter, task: EvalTask, tokenizer, limit: int) -> dict[str, float]:
    """The loss in nats per completion token, by part."""
    encoded = encode_task(task, tokenizer, limit)
    examples = encoded.examples
    others = [Example(list(prompt), []) for prompt in other_prompts(encoded, shuffle=0) or ()]
    buckets, (longest,) = plan_buckets(examples, 3), plan_buckets(others, 1)
    completions = {bucket.length: bucket.completion for bucket in buckets}
    where = parts(model.config.num_layers, adapter.config.target_modules)
    nats = dict.fromkeys(where, 0.0)
    for members, batch in full_batches(examples, ROWS, buckets):
        read = collate([others[i] for i in members], longest, ROWS)
        own = adjustments_for(model, adapter, batch.tokens, batch.prompt_length)
        other = adjustments_for(model, adapter, read.tokens, read.prompt_length)
        assert own is not None and other is not None
        for name, chosen in where.items():
            made = swapped(own, other, *chosen)
            found, _, _ = eval_nll(model, made, batch, completion=completions[batch.tokens.shape[1]])
            nats[name] += float(found.sum())
    tokens = sum(len(example.completion_ids) for example in examples)
    return {name: total / tokens for name, total in nats.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--limit", type=int, default=200, help="examples")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    log_to_stderr()
    model = load_backbone(args.backbone, dtype="float32", layout="layers")
    tokenizer = load_tokenizer(args.backbone)
    records = load_records(load_config(None, [f"data.test={args.data}"]).data, "test")
    if not records:
        parser.error(f"--data {args.data}: no examples")
    task = EvalTask(Path(args.data).stem, records, metric="loss")
    found = [losses(model, load_adapter(folder, model.config), task, tokenizer, args.limit) for folder in args.adapters]
    print(f"| factors of another prompt | loss, median of {len(found)} | least to most | rise |\n|---|---|---|---|")
    for name in found[0]:
        values, rises = [one[name] for one in found], [one[name] - one["none"] for one in found]
        print(f"| {name} | {median(values):.3f} | {min(values):.3f} to {max(values):.3f} | {median(rises):+.3f} |")
    if args.output:
        asked = {"backbone": args.backbone, "data": args.data, "limit": args.limit, "adapters": args.adapters}
        about = {"asked": asked, "device": describe_devices(), "versions": library_versions()}
        write_record(args.output, {"losses": found} | about)


if __name__ == "__main__":
    main()

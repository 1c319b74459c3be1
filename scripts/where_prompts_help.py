"""Which factors of a trained PARA adapter have to be those of the example's own prompt?

    python scripts/where_prompts_help.py --data data/banking77/validation.jsonl --adapters DIR DIR --output FILE.json

The loss of the first examples, where some of their factors are made of another example's prompt (as `para-jax evaluate
--shuffle-prompts` does with all of them): of all layers and sites, of one site, of a third of the layers. What the loss
rises by is what these factors owe to the prompt. Medians over the adapters, with their range.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np

from para_jax import load_adapter, load_backbone, load_config, load_tokenizer
from para_jax.adapters.adapter import Factors
from para_jax.data.records import load_records
from para_jax.devices import describe_devices, versions
from para_jax.evaluation.evaluate import (
    EvalTask,
    adapters_of_batches,
    derangement,
    encode_task,
    likelihoods,
    plan_shapes,
    score_of,
)
from para_jax.model import Made

ROWS = 16


def parts(layers: int, sites: tuple[str, ...]) -> dict:
    """Name to the layers and the sites whose factors are another prompt's."""
    third, everywhere = np.array_split(np.arange(layers), 3), range(layers)
    named = {f"layers {part[0]} to {part[-1]}": (set(part.tolist()), set(sites)) for part in third}
    of_sites = {site: (set(everywhere), {site}) for site in sites}
    return {"none": (set(), set()), "all": (set(everywhere), set(sites)), **of_sites, **named}


def swapped(own: Made, other: Made, layers: set[int], sites: set[str]) -> Made:
    """The factors `own`, but at these layers and sites `other`."""
    mixed = []
    for layer, (mine, theirs) in enumerate(zip(own.layers, other.layers, strict=True)):
        chosen = sites if layer in layers else set()
        distance = {site: (theirs if site in chosen else mine).distance[site] for site in mine.distance}
        mixed.append(Factors(distance))
    return Made(tuple(mixed))


def once(of_batch):
    """The function, which makes what belongs to the same rows once."""
    made = {}

    def of(rows) -> Made:
        key = tuple(rows.tolist())
        if key not in made:
            made[key] = of_batch(rows)
        return made[key]

    return of


def losses(model, adapter, task: EvalTask, tokenizer, limit: int) -> dict[str, float]:
    """The loss, nats a completion token, by part."""
    encoded = encode_task(task, tokenizer, limit)
    task, examples, _ = encoded
    prompts = [example.prompt_ids for example in examples]
    followers = derangement(task.name, len(prompts), seed=0)
    own = once(adapters_of_batches(model, adapter, prompts))
    other = once(adapters_of_batches(model, adapter, [prompts[i] for i in followers]))
    found = {}
    for name, where in parts(model.config.num_layers, adapter.config.target_modules).items():
        of_batch = lambda rows, where=where: swapped(own(rows), other(rows), *where)  # noqa: E731
        scored = likelihoods(model, of_batch, examples, ROWS, plan_shapes([encoded]), list(followers))
        found[name] = score_of(task, scored.nll, scored.tokens, []).loss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--limit", type=int, default=200, help="examples")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = load_backbone(args.backbone, dtype="float32", layout="layers")
    tokenizer = load_tokenizer(args.backbone)
    records = load_records(load_config(None, [f"data.test={args.data}"]).data, "test")
    assert records, args.data
    task = EvalTask(Path(args.data).stem, records, metric="loss")
    found = [losses(model, load_adapter(folder, model.config), task, tokenizer, args.limit) for folder in args.adapters]
    print(f"| factors of another prompt | loss, median of {len(found)} | least to most | rise |\n|---|---|---|---|")
    for name in found[0]:
        values, rises = [one[name] for one in found], [one[name] - one["none"] for one in found]
        print(f"| {name} | {median(values):.3f} | {min(values):.3f} to {max(values):.3f} | {median(rises):+.3f} |")
    if args.output:
        asked = {"backbone": args.backbone, "data": args.data, "limit": args.limit, "adapters": args.adapters}
        about = {"asked": asked, "device": describe_devices(), "versions": versions()}
        args.output.write_text(json.dumps({"losses": found} | about, indent=1) + "\n")


if __name__ == "__main__":
    main()

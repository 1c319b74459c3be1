"""What structured outputs cost: 8 rows decode greedily, free, with a pattern that allows any text, and with a schema.

    python scripts/experiments/bench_structured.py --rounds 5

Rounds are interleaved. The rows with the pattern give the same tokens as the free ones.
"""

import argparse
import time
from statistics import median

import numpy as np

from para_jax import AdapterBank, Engine, ParaConfig, Request, init_adapter, load_backbone, load_tokenizer

ROWS, TOKENS = 8, 64
TEXT = {"type": "string", "minLength": 400}
KINDS = {
    "free": None,
    "any text": {"regex": r"[\s\S]*"},
    "schema": {"json": {"type": "object", "properties": {"a": TEXT}, "required": ["a"], "additionalProperties": False}},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_backbone("smollm2-135m"), load_tokenizer("smollm2-135m")
    adapter = init_adapter(ParaConfig(r=12), model.config)
    bank = AdapterBank.holding({"tenant": adapter}, model.config)
    engine = Engine(model, bank, tokenizer, slots=ROWS, max_length=128)
    engine.warm_up()
    speeds, texts = {kind: [] for kind in KINDS}, {}
    for _ in range(args.rounds):
        for kind, structure in KINDS.items():
            for i in range(ROWS):
                prompt = [{"role": "user", "content": f"Tell a long story about the number {i}."}]
                engine.submit(Request(prompt, "tenant", max_new_tokens=TOKENS, structured_outputs=structure, id=i))
            began = time.perf_counter()
            answers = {answer.id: answer for answer in engine.run()}
            seconds = time.perf_counter() - began
            assert not any(answer.error for answer in answers.values()), answers[0].error
            speeds[kind].append(sum(len(answer.tokens) for answer in answers.values()) / seconds)
            texts[kind] = [answers[i].tokens for i in range(ROWS)]
    free = median(speeds["free"])
    for kind, found in speeds.items():
        spread = np.array(found) / np.array(speeds["free"])
        print(f"{kind}: {median(found):.1f} tokens/s, {median(found) / free:.3f} of free, each round {spread.round(3)}")
    print("same tokens:", texts["any text"] == texts["free"])


if __name__ == "__main__":
    main()

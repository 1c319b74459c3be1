"""The torch side of bench_decode_peer.py: decode steps on request, in a process of its own.

    python scripts/experiments/decode_worker.py FOLDER '{"tokens": [[...]], "tenants": 8}'

Each input line is "THREADS ROWS base|mixed". The answer, as JSON, is the seconds of one decode step of that many rows,
and the next tokens. `base` is transformers' model alone. In `mixed`, row i has LoRA adapter i mod 8 (r=8 on all linear
layers, random weights) through PEFT's `adapter_names`. The cache is cropped after each step, so the context stays.
"""

import json
import sys
import time

import peft
import torch
import transformers


def main():
    folder, given = sys.argv[1], json.loads(sys.argv[2])
    tokens = torch.tensor(given["tokens"])
    context = tokens.shape[1] - 1
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mixed = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    mixed = peft.get_peft_model(mixed, config, adapter_name="0")
    for i in range(1, given["tenants"]):
        mixed.add_adapter(str(i), config)
    mixed.eval()
    caches = {}
    print(
        json.dumps({"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}),
        flush=True,
    )
    for line in sys.stdin:
        threads, rows, which = line.split()
        torch.set_num_threads(int(threads))
        rows, model = int(rows), {"base": base, "mixed": mixed}[which]
        names = {} if which == "base" else {"adapter_names": [str(i % given["tenants"]) for i in range(rows)]}
        with torch.inference_mode():
            if (rows, which) not in caches:
                made = model(input_ids=tokens[:rows, :context], use_cache=True, logits_to_keep=1, **names)
                caches[rows, which] = made.past_key_values
            cache = caches[rows, which]
            start = time.perf_counter()
            logits = model(input_ids=tokens[:rows, context:], past_key_values=cache, use_cache=True, **names).logits
            chosen = logits[:, -1].argmax(-1)
            seconds = time.perf_counter() - start
        cache.crop(-1)
        print(json.dumps([seconds, chosen.tolist()]), flush=True)


if __name__ == "__main__":
    main()

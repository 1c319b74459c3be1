"""The torch side of bench_peft.py: PEFT training steps on request, in a process of its own.

    python scripts/experiments/peft_worker.py FOLDER lora|ia3 '{"tokens": [[...]], "prompt": 48}'

Each input line is "THREADS plain|kept". The answer, as JSON, is the seconds of one step and its loss. With `plain`,
logits are made at every position and the labels are -100 outside the completion. With `kept`, `logits_to_keep` limits
them to the completion.
"""

import json
import sys
import time

import peft
import torch
import transformers

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "v_proj", "up_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
}


def main():
    folder, method, batch = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    tokens = torch.tensor(batch["tokens"])
    labels = tokens.clone()
    labels[:, : batch["prompt"]] = -100
    kept = tokens.shape[1] - batch["prompt"] + 1  # the first completion token is predicted at the last prompt token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(model, ADAPTERS[method]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    arguments = {"plain": {"labels": labels}, "kept": {"labels": labels[:, -kept:], "logits_to_keep": kept}}
    model.train()
    print(
        json.dumps({"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}),
        flush=True,
    )
    for line in sys.stdin:
        threads, logits = line.split()
        torch.set_num_threads(int(threads))
        start = time.perf_counter()
        loss = model(input_ids=tokens, use_cache=False, **arguments[logits]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps([time.perf_counter() - start, loss.item()]), flush=True)


if __name__ == "__main__":
    main()

"""The torch side of compare_peft.py, in a process of its own.

    python scripts/experiments/compare_peft_worker.py BACKBONE FOLDER

Trains the PEFT adapter of FOLDER/start on the batches of FOLDER/given.npz, one step each, as FOLDER/training.json says.
Writes the adapter to FOLDER/theirs, and the losses and the log-probabilities of the answers to FOLDER/found.npz. Prints
the versions.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers


def main():
    backbone, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    given, training = np.load(folder / "given.npz"), json.loads((folder / "training.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    begun = time.perf_counter()
    losses = train(model, given, training)
    model.save_pretrained(folder / "theirs")
    scores = score(model.eval(), given)
    np.savez(folder / "found.npz", losses=losses, scores=scores, seconds=time.perf_counter() - begun)
    print(json.dumps({module.__name__: module.__version__ for module in (torch, peft, transformers)}))


def train(model, given, training: dict) -> np.ndarray:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, **training["adam"])
    losses = []
    model.train()
    for i, rate in enumerate(given["rates"]):
        tokens, prompt, length = (torch.tensor(given[f"{n}_{i}"]).long() for n in ("tokens", "prompt_length", "length"))
        place = torch.arange(tokens.shape[1])
        real = place < length[:, None]
        labels = torch.where(real & (place >= prompt[:, None]), tokens, -100)
        loss = model(input_ids=tokens, attention_mask=real.long(), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, training["max_grad_norm"])
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


def score(model, given) -> np.ndarray:
    """The log-probability of each answer after each prompt, [rows, answers]. Prompts of one length form a batch."""
    lengths, answers = given["prompt_lengths"], torch.tensor(given["answers"])
    scores = np.zeros((len(lengths), len(answers)))
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        tokens = torch.tensor(given["prompts"][rows, :length]).long()
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        scores[rows] = logits.log_softmax(-1)[:, answers].numpy()
    return scores


if __name__ == "__main__":
    main()

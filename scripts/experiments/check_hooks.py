"""Checks the code of docs/other_servers.md: its numpy Llama, and torch's with forward hooks, have para_jax's logits.

    python scripts/experiments/check_hooks.py

On a tiny random Llama and strong PARA adapters of scope `response`, float32 on a CPU, for prompts of 7 tokens and of 1.
Fails if logits differ by more than 1e-4, if greedy tokens differ, or if an adapter moves the backbone's logits by less
than 0.1. It needs torch: the extra [bench-peft]. The tests run the numpy part without it.
"""

import argparse
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from para_jax import ParaConfig, forward, init_adapter, load_adapter, load_backbone, save_adapter
from para_jax.adapters.adapter import named_leaves, with_leaves
from para_jax.inference.generate import generate_tokens
from para_jax.inference.sampling import Sampling

ROOT = Path(__file__).parents[2]
LIMIT, MOVED, LENGTHS, ANSWER = 1e-4, 0.1, (7, 1), 8
SIX = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "r=4": ParaConfig(r=4, scope="response"),
    "six sites": ParaConfig(r=4, late_r=6, up_bias=True, target_modules=SIX, summary="rms", scope="response"),
    "constant": ParaConfig(r=3, pooler="constant", activation="silu", layers_to_transform=(0, 2), scope="response"),
    "rms": ParaConfig(r=3, activation="silu", summary="rms", scope="response"),
    "o_proj": ParaConfig(r=2, activation="gelu_tanh", target_modules=("o_proj", "up_proj"), scope="response"),
    "relu": ParaConfig(r=2, activation="relu", scope="response"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=ROOT / "tests" / "fixtures" / "llama")
    args = parser.parse_args()
    code, failed = page_code(torch=True), []
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            case = Case(args.backbone, config, Path(folder) / "adapter")
            for side, start in {"numpy": case.numpy_step(code), "torch": case.torch_step(code)}.items():
                difference, same = case.compare(code, start)
                print(f"{name:<12}{side}   difference {difference:.1e}   moved by {case.moved:.3g}", flush=True)
                if not (difference <= LIMIT and same and case.moved >= MOVED):
                    failed.append(f"{name} in {side}")
    sys.exit(f"check_hooks: failed: {', '.join(failed)}" if failed else 0)


def page_code(*, torch: bool) -> dict:
    """What the page's blocks of code define."""
    text = (ROOT / "docs" / "other_servers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = {}
    for block in blocks if torch else blocks[:-1]:
        exec(compile(block, "docs/other_servers.md", "exec"), found)
    return found


class Case:
    """A strong adapter in a folder, and para_jax's logits and greedy tokens for one prompt per length."""

    def __init__(self, backbone: Path, config: ParaConfig, folder: Path):
        model, rng = load_backbone(backbone, dtype="float32"), np.random.default_rng(0)
        save_adapter(strong(init_adapter(config, model.config), rng), folder)
        adapter = load_adapter(folder, model.config)
        self.backbone, self.folder = backbone, folder
        self.tokens = rng.integers(3, model.config.vocab_size, (len(LENGTHS), max(LENGTHS) + ANSWER), np.int32)
        self.logits = np.asarray(forward(model, adapter, self.tokens, np.array(LENGTHS)))
        self.moved = float(abs(self.logits - np.asarray(forward(model, None, self.tokens, 1))).max())
        prompts = [row[:p].tolist() for row, p in zip(self.tokens, LENGTHS, strict=True)]
        self.answers = generate_tokens(model, adapter, prompts, Sampling(max_new_tokens=ANSWER))

    def numpy_step(self, code):
        llama, adapter = code["read_llama"](self.backbone), code["read_adapter"](self.folder)
        return lambda: partial(code["step"], llama, adapter, code["new_sequence"](llama[0]))

    def torch_step(self, code):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(self.backbone, dtype="float32").eval()
        hooked = code["HookedLlama"](model, code["read_adapter"](self.folder))

        def start():
            hooked.new_sequence()
            return hooked.step

        return start

    def compare(self, code, start) -> tuple[float, bool]:
        """The largest difference in logits, and whether the greedy tokens are the same; start() gives a new step."""
        differences, same = [], True
        for row, logits, p, answer in zip(self.tokens.tolist(), self.logits, LENGTHS, self.answers, strict=True):
            step = start()
            parts = [step(row[: p - 1])] if p > 1 else []
            parts += [step(row[p - 1 : p], last_of_prompt=True), *(step([token]) for token in row[p:])]
            differences.append(abs(np.concatenate([np.asarray(part) for part in parts]) - logits).max())
            same &= code["greedy"](start(), row[:p], len(answer)) == answer
        return float(max(differences)), same


def strong(adapter, rng):
    """The adapter with noise from N(0, 0.1) on W_up, its bias, a learned constant and a mean."""
    drawn = {
        name: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        for name, leaf in named_leaves(adapter).items()
        if name.startswith(("up", "constant", "mean"))
    }
    return with_leaves(adapter, named_leaves(adapter) | drawn)


if __name__ == "__main__":
    main()

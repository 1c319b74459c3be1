"""Checks that PEFT loads what para_jax writes, and the other way round, with the same logits, float32 on a CPU.

    python scripts/experiments/check_peft.py --torch-python /path/to/python-with-torch-peft-and-transformers

Backbones: tiny random Llama and Phi-3 models made by transformers (Phi-3 joins q, k and v, and gate and up, in one
linear layer each), and --backbone. Adapters: LoRA, rank-stabilised LoRA, activated LoRA and (IA)^3 made by para_jax,
`export_ia3` of a strong PARA adapter, and LoRA, activated LoRA and (IA)^3 made by PEFT. Fails if logits differ by more
than 2e-4, if an adapter moves the backbone's logits by less than 0.1, or if PEFT loads a folder with a scope that it
does not know. Much stronger adapters, which move them by 45, amplify float32 rounding beyond that limit on either side.
The torch side (check_peft_worker.py) needs the extra [bench-peft].
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from measure import options

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    export_ia3,
    forward,
    init_adapter,
    load_adapter,
    load_backbone,
    load_tokenizer,
    save_adapter,
)
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.config import SITES
from para_jax.data.examples import encode_prompt
from para_jax.io.hub import resolve_backbone
from para_jax.io.record_file import write_record
from para_jax.reports.inspect import new_record
from para_jax.runtime.devices import library_versions

LIMIT, MOVED, COMPLETION = 2e-4, 0.1, 12
PROMPT = "The customer asks where the parcel is, and when it will arrive."
WORKER = Path(__file__).with_name("check_peft_worker.py")
SCALED = ("q_proj", "up_proj", "down_proj")
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8),
    "lora, all linear": LoraConfig(r=3, lora_alpha=6, target_modules=SITES),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=SCALED),
    "ia3": Ia3Config(),
    "ia3, outputs": Ia3Config(target_modules=SCALED, feedforward_modules=()),
}
#: Activated LoRA: the invocation is the end of PROMPT.
INVOCATION = 3
ACTIVATED = {"alora": {}, "alora, all linear": {"r": 3, "use_rslora": True, "target_modules": SITES}}
#: What PEFT must not load.
UNKNOWN = [kind(scope=scope) for kind in (LoraConfig, Ia3Config) for scope in ("prompt", "response")]


def main():
    parser = options(__doc__, "results/check_peft.json")
    parser.add_argument("--torch-python", default=sys.executable)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.backbone)
    checked, peers = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("llama", "phi3", args.backbone):
            folder = Path(temporary) / Path(name).name
            if name == args.backbone:
                convert_gguf(resolve_backbone(name), folder / "backbone", tokenizer)
            else:
                torch_side(args.torch_python, "make", name, len(tokenizer), folder / "backbone")
            checked[name], peers = check(folder, args.torch_python, tokenizer)
            for case, (difference, moved) in checked[name].items():
                print(f"{name:<14}{case:<26}difference {difference:.1e}   moved by {moved:.3g}", flush=True)
    cases = {f"{name}: {case}": found for name, found_ in checked.items() for case, found in found_.items()}
    failed = [name for name, found in cases.items() if not agrees(name, *found)]
    report = {
        "versions": library_versions() | peers,
        "limit": LIMIT,
        "largest_difference": max(off for off, _ in cases.values()),
        "failed": failed,
        "cases": {name: {"difference": off, "moved": moved} for name, (off, moved) in cases.items()},
    }
    write_record(args.output, new_record(shlex.join(["python", *sys.argv]), report))
    print(f"the largest difference is {report['largest_difference']:.1e}, the limit {LIMIT}")
    sys.exit(f"check_peft: failed: {', '.join(failed)}" if failed else 0)


def agrees(name: str, difference: float, moved: float) -> bool:
    """Whether a case has equal logits, and its adapter moved them. A NaN is neither."""
    return difference <= LIMIT and (moved >= MOVED or name.endswith("backbone"))


def check(folder: Path, torch_python: str, tokenizer) -> tuple[dict, dict]:
    """Each case's largest difference in logits, and how far the adapter moves them; and the torch side's versions."""
    model, prompt = load_backbone(folder / "backbone", dtype="float32"), encode_prompt(tokenizer, PROMPT)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, len(prompt) + COMPLETION), np.int32)
    tokens[:, : len(prompt)] = prompt
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "invocation.npy", prompt[-INVOCATION:])
    ends = dict(scope="response", scope_window=INVOCATION, alora_invocation_tokens=tuple(prompt[-INVOCATION:]))
    configs = CONFIGS | {name: LoraConfig(**ends, **fields) for name, fields in ACTIVATED.items()}
    adapters = {name: strong(init_adapter(config, model.config), i) for i, (name, config) in enumerate(configs.items())}
    for name, adapter in adapters.items():
        save_adapter(adapter, folder / "ours" / name)
    para = strong(init_adapter(ParaConfig(r=12, summary="rms"), model.config), 9)
    for i, config in enumerate(UNKNOWN):
        save_adapter(init_adapter(config, model.config), folder / "unknown" / str(i))
    export_ia3(para, model, PROMPT, folder / "ours" / "export_ia3 of PARA", tokenizer=tokenizer)
    found_versions = torch_side(torch_python, "logits", folder)
    adapters |= {"export_ia3 of PARA": para}
    adapters |= {path.name: load_adapter(path, model.config) for path in sorted((folder / "theirs").iterdir())}
    base, found = np.asarray(forward(model, None, tokens, len(prompt))), {}
    with np.load(folder / "logits.npz") as theirs:
        for name, adapter in ({"backbone": None} | adapters).items():
            logits = np.asarray(forward(model, adapter, tokens, len(prompt)))
            found[name] = float(abs(logits - theirs[name]).max()), float(abs(logits - base).max())
    return found, found_versions


def strong(adapter, seed: int):
    """A strong adapter: weights that start at zero (at one in (IA)^3) get noise from N(0, 0.1)."""
    weights = next(getattr(adapter, name) for name in ("up", "b", "scale") if hasattr(adapter, name))
    for i, site in enumerate(adapter.config.target_modules):
        drawn = np.random.default_rng([seed, i]).normal(0, 0.1, weights[site].shape)
        weights[site][...] = jnp.asarray(adapter.neutral + drawn, jnp.float32)
    return adapter


def torch_side(python: str, *arguments) -> dict:
    """Runs check_peft_worker.py and returns the versions that it prints."""
    said = subprocess.run([python, str(WORKER), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout.splitlines()[-1]) if said.returncode == 0 else sys.exit("check_peft: see above")


if __name__ == "__main__":
    main()

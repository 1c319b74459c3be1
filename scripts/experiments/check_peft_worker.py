"""The torch side of check_peft.py, in a process of its own.

    python scripts/experiments/check_peft_worker.py make llama|phi3 VOCABULARY FOLDER
    python scripts/experiments/check_peft_worker.py logits FOLDER

`make` writes a tiny random backbone. `logits` loads each adapter of FOLDER/ours with PEFT on FOLDER/backbone, makes
some of PEFT's own in FOLDER/theirs, and writes the logits of FOLDER/tokens.npy for all of them to FOLDER/logits.npz.
It fails if PEFT loads one of FOLDER/unknown. Both print the versions.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LINEARS = {"llama": ["q_proj", "v_proj", "down_proj"], "phi3": ["qkv_proj", "gate_up_proj", "down_proj"]}


def make(family: str, vocabulary: str, folder: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=int(vocabulary), **SIZES)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def logits(folder: Path) -> None:
    tokens = torch.tensor(np.load(folder / "tokens.npy")).long()
    found = {"backbone": forward(load(folder), tokens)}
    for path in sorted((folder / "ours").iterdir()):
        found[path.name] = forward(peft.PeftModel.from_pretrained(load(folder), path), tokens)
    for path in sorted((folder / "unknown").iterdir()):
        require_refused(folder, path)
    invocation = np.load(folder / "invocation.npy").tolist()
    for name, config in theirs(LINEARS[load(folder).config.model_type], invocation).items():
        torch.manual_seed(1)
        model = peft.get_peft_model(load(folder), config)
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name or "ia3_l" in weight_name:
                weight.data += 0.1 * torch.randn_like(weight)
        model.save_pretrained(folder / "theirs" / name)
        found[name] = forward(model, tokens)
    np.savez(folder / "logits.npz", **found)


def require_refused(folder: Path, path: Path) -> None:
    try:
        peft.PeftModel.from_pretrained(load(folder), path)
    except (KeyError, ValueError) as error:
        if "PARA_JAX" not in str(error):
            raise
        return
    sys.exit(f"PEFT loads {path}, although it does not know its scope")


def theirs(linears: list[str], invocation: list[int]) -> dict:
    return {
        "peft alora": peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM", alora_invocation_tokens=invocation
        ),
        "peft lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM"),
        "peft rslora, all linear": peft.LoraConfig(
            r=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        "peft ia3": peft.IA3Config(target_modules=linears, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    }


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32)


def forward(model, tokens) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits.numpy()


if __name__ == "__main__":
    warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1] == "make":
        make(*sys.argv[2:])
    else:
        logits(Path(sys.argv[2]))
    modules = {"torch": torch, "transformers": transformers, "peft": peft}
    print(json.dumps({name: module.__version__ for name, module in modules.items()}))

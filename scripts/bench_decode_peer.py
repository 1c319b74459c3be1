"""Milliseconds a token of greedy decoding, one row, float32 on a CPU: para_jax beside transformers on torch.

    python scripts/bench_decode_peer.py --backbone FOLDER --torch-python /path/to/python-with-torch-and-transformers

FOLDER is a Hugging Face folder (of a .gguf file: `para-jax convert`). Rounds are interleaved: para_jax, then torch with
one thread and with two; a time is a whole call, prefill and all, divided by its new tokens. Prints JSON and
writes it to results/bench_decode_peer.json.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

TORCH = """
import json, sys, time, torch, transformers
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.generation_config.eos_token_id = None
for line in sys.stdin:
    torch.set_num_threads(int(line))
    start = time.perf_counter()
    with torch.inference_mode():
        written = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, written[0, len(ids):].tolist(), torch.__version__]), flush=True)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/bench_decode_peer.json"))
    args = parser.parse_args()

    from para_jax import load_backbone, load_tokenizer
    from para_jax.data.examples import encode_prompt
    from para_jax.inference.generate import generate_tokens

    model, ids = (
        load_backbone(args.backbone, dtype="float32"),
        encode_prompt(load_tokenizer(args.backbone), args.prompt),
    )
    command = [args.torch_python, "-c", TORCH, args.backbone, json.dumps(ids), str(args.new_tokens)]
    torch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run_para_jax():
        start = time.perf_counter()
        written = generate_tokens(model, None, [ids], max_new_tokens=args.new_tokens)[0]
        return time.perf_counter() - start, written, "para_jax"

    def run_torch(threads):
        print(threads, file=torch.stdin, flush=True)
        return json.loads(torch.stdout.readline())

    def paused(run):
        time.sleep(0.4)  # the threads of the side before stop spinning
        return run()

    sides = {"para_jax": run_para_jax, "torch_1_thread": lambda: run_torch(1), "torch_2_threads": lambda: run_torch(2)}
    warm = {name: run() for name, run in sides.items()}
    rounds = [{name: paused(run)[0] / args.new_tokens * 1e3 for name, run in sides.items()} for _ in range(args.rounds)]
    torch.stdin.close()
    median = {name: statistics.median(times[name] for times in rounds) for name in sides}
    ratio = median["para_jax"] / min(median["torch_1_thread"], median["torch_2_threads"])
    report = {
        "milliseconds_a_token": median,
        "ratio": ratio,
        "same_tokens": warm["para_jax"][1] == warm["torch_1_thread"][1],
        "prompt_tokens": len(ids),
        "new_tokens": args.new_tokens,
        "rounds": rounds,
        "torch": warm["torch_1_thread"][2],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"command": shlex.join(["python", *sys.argv]), **report}, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

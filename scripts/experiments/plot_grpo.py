"""The picture of tunix_grpo.py's runs: the mean reward of each step, smoothed over five, and held-out values.

python scripts/experiments/plot_grpo.py runs/grpo/*.json --output results/tunix_grpo
"""

import argparse
import json
from pathlib import Path

import numpy as np
from compare_pictures import save

from para_jax.io.figures import explain, method_colour, new_figure, style

NAMES = {"para": "PARA r=12", "lora": "LoRA r=18", "ia3": "(IA)^3"}


@style()
def draw(runs: list[dict]):
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    for method, name in NAMES.items():
        of_method = [run for run in runs if run["method"] == method]
        curves = np.array([np.convolve(run["rewards"], np.ones(5) / 5, "valid") for run in of_method])
        steps, colour = np.arange(curves.shape[1]) + 3, method_colour(name)
        axes.plot(steps, curves.mean(0), color=colour, linewidth=2, label=name)
        axes.plot(steps, curves.T, color=colour, linewidth=0.6)
    axes.set(xlabel="step (32 answers each)", ylabel="mean reward", ylim=(0, 1))
    axes.legend()
    explain(figure, "Each seed by a thin line, their mean by a thick one; means over five steps.")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in args.runs]
    save(draw(runs), args.output.with_suffix(".png"))
    rounded = [run | {"rewards": [round(reward, 3) for reward in run["rewards"]]} for run in runs]
    args.output.with_suffix(".json").write_text("[\n" + ",\n".join(map(json.dumps, rounded)) + "\n]\n")
    for run in runs:
        print(run["method"], run["seed"], f"{run['reward_before']:.3f} -> {run['reward_after']:.3f}")


if __name__ == "__main__":
    main()

"""The factors that an adapter makes from prompts, and how much they differ from prompt to prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..config import SITES
from ..data.batches import full_batches, plan_buckets
from ..data.examples import Example, Prompt, encode_prompt
from ..io.progress import Progress
from ..io.table import table
from ..model.adapted import vectors


class Spread(NamedTuple):
    """How factors differ over prompts: arrays float64 [layers], root mean squares over a site's units."""

    size: dict[str, np.ndarray]
    """by site: of l - 1 averaged over the prompts, the part that all prompts share"""
    spread: dict[str, np.ndarray]
    """by site: of each prompt's distance from that average"""
    prompts: int

    @property
    def ratio(self) -> dict[str, np.ndarray]:
        """Spread over size: 0 if the adapter ignores the prompt, as (IA)^3 does; NaN if all factors are 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return {site: self.spread[site] / self.size[site] for site in self.size}

    def __str__(self) -> str:
        """A table with a row per layer and one for all layers, and a column per site; a line if no factor differs."""
        if all((of == 0).all() for of in self.spread.values()):
            return f"0 in all layers of {', '.join(self.spread)}: the factors are the same for every prompt"
        by_layer = zip(*self.ratio.values(), strict=True)
        rows = [["layer", *self.size], *([str(layer), *map("{:.4f}".format, of)] for layer, of in enumerate(by_layer))]
        return table([*rows, ["all", *map("{:.4f}".format, self.overall().values())]])

    def overall(self) -> dict[str, float]:
        """The ratio of each site over all layers together."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return {site: root_mean_square(self.spread[site]) / root_mean_square(self.size[site]) for site in self.size}


def factors_of(model, adapter, prompt: Prompt, tokenizer) -> dict[str, np.ndarray]:
    """The factors l of one prompt, {site: float32 [layers, site width]}. Raises ValueError for an adapter without
    factors."""
    ids = encode_prompt(tokenizer, prompt)
    made = vectors(model, adapter, np.array([ids], np.int32), len(ids))
    return {site: np.asarray(factors[:, 0]) for site, factors in made.items()}


def factor_spread(model, adapter, prompts: Sequence[Prompt], tokenizer, *, rows: int = 8) -> Spread:
    """How much an adapter's factors differ over at least 2 prompts, with `rows` of them in a batch."""
    if len(prompts) < 2:
        raise ValueError(f"prompts: {len(prompts)} given; give at least 2 to compare their factors")
    examples = [Example(encode_prompt(tokenizer, prompt), []) for prompt in prompts]
    total, squares = {}, {}
    batches = list(full_batches(examples, rows, plan_buckets(examples, 3)))
    with Progress("factors", len(examples), unit="prompt") as bar:
        for indices, batch in batches:
            for site, made in vectors(model, adapter, batch.tokens, batch.prompt_length).items():
                distance = np.asarray(made, np.float64)[:, : len(indices)] - 1
                total[site] = total.get(site, 0) + distance.sum(axis=1)
                squares[site] = squares.get(site, 0) + (distance**2).sum(axis=1)
            bar.advance(len(indices))
    count, sites = len(prompts), [site for site in SITES if site in total]
    mean = {site: total[site] / count for site in sites}
    variance = {site: np.maximum(squares[site] / count - mean[site] ** 2, 0) for site in sites}
    return Spread(
        {site: root_mean_square(mean[site]) for site in sites},
        {site: np.sqrt(variance[site].mean(axis=-1)) for site in sites},
        count,
    )


def root_mean_square(values: np.ndarray):
    return np.sqrt((values**2).mean(axis=-1))

"""Lowering a program whose arguments hold Rows, for its size and cost."""

import jax

from para_jax.training.step import eval_nll


def lowered(function, given, static):
    """function.lower(*given, **static). For eval_nll it is lowered with flat arrays, because the type checks of tests
    refuse the abstract arrays that `lower` puts into Rows."""
    if function is not eval_nll:
        return function.lower(*given, **static)
    leaves, tree = jax.tree.flatten(given)
    flat = jax.jit(lambda leaves: eval_nll(*jax.tree.unflatten(tree, leaves), **static))
    return flat.lower(leaves)

"""Memory and traffic of a decode step without and with beams, by method, by the TPU's compiler, without a TPU.

    pip install '.[aot]'
    python scripts/experiments/tpu_beams.py

One prompt with 512 tokens of cache, in bfloat16 on one v5e. With 3 beams the step also brings the cache into the order
of the beams that go on. DoRA's step costs what LoRA's costs, and a norm more.
"""

import jax
import jax.numpy as jnp
from program_counts import Program, describe_program
from tpu_compile import METHODS, PLACES, decode_state, state_shardings

from para_jax import LoraConfig, load_model_config, make_mesh
from para_jax.backbone.load import abstract_backbone
from para_jax.config import SITES
from para_jax.estimate.topology import topology_devices
from para_jax.inference.generate import next_likeliest, next_token
from para_jax.io.table import table
from para_jax.runtime.sharding import with_sharding

TOP = 4  # likeliest tokens that a search of 3 beams reads of each row, with one end token
BACKBONES = [source for source, chips in PLACES.values() if chips == 1]
COMPARED = {name: METHODS[name] for name in ("base", "PARA r=12", "(IA)^3 on q, v, up")}
COMPARED["LoRA r=8"] = LoraConfig(r=8, target_modules=SITES)


def main():
    for source in BACKBONES:
        rows = [("method", "beams", "bytes accessed", "memory", "temporaries")]
        for beams in (1, 3):
            base = None
            for method, config in COMPARED.items():
                program = describe_program(compiled(source, config, beams))
                base = base or program
                rows.append((method, str(beams), *cells(program, base)))
        print(f"\n{source}\n" + table(rows, left=(0,)), flush=True)


def cells(program: Program, base: Program) -> tuple[str, ...]:
    """Each count, and by how much it exceeds the base's."""
    counts = ((one.bytes_accessed, one.memory, one.temporaries) for one in (program, base))
    return tuple(f"{ours / 1e9:.3f} GB ({ours / bases:.4f})" for ours, bases in zip(*counts, strict=True))


def compiled(source: str, adapter, beams: int):
    """The compiled step that `generate` takes. All beams have the adapter of their prompt."""
    mesh = make_mesh(devices=topology_devices("v5e:1x1", 1))
    config = load_model_config(source)
    model = abstract_backbone(config, jnp.bfloat16, mesh, layout="layers")
    state = decode_state(model, adapter, beams)
    state = jax.tree.map(with_sharding, state, state_shardings(state, mesh, config))
    each = with_sharding(jax.ShapeDtypeStruct((beams,), jnp.int32), state.length.sharding)
    leaves, treedef = jax.tree.flatten(model)
    with jax.set_mesh(mesh):
        if beams == 1:
            return next_token.lower(treedef, leaves, state, each, None, 1).compile()
        return next_likeliest.lower(treedef, leaves, state, each, each, TOP).compile()


if __name__ == "__main__":
    main()

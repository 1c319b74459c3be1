"""Collectives of compiled programs, counted over all iterations of their loops."""

import jax
import jax.numpy as jnp
from hlo import collective_bytes, collectives_run
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import tpu_devices

from para_jax import make_mesh


def test_bytes_of_collectives_are_counted_over_all_iterations():
    text = """
HloModule m

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  ROOT %r = f32[] parameter(1)
}

%condition (c: f32[8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = (f32[8,2]{1,0}, pred[3]{0}) all-reduce(%p, %p), to_apply=%add
  ROOT %g = f32[8]{0} copy(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%x), dimensions={0}
  %d = bf16[32]{0} all-gather-done(%s)
  ROOT %w = f32[8]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert collective_bytes(text) == {"all-reduce": (64 + 3) * 5, "all-gather": 64}


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    mesh = make_mesh(8)
    over = NamedSharding(mesh, PartitionSpec("data"))

    def program(x):
        def body(total, _):
            everywhere = jax.lax.with_sharding_constraint(jnp.tanh(x + total), NamedSharding(mesh, PartitionSpec()))
            return total + everywhere.sum(), None

        return jax.lax.scan(body, 0.0, length=5)[0]

    text = jax.jit(program).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=over)).compile().as_text()
    assert sum(collectives_run(text).values()) == 5


def test_on_a_tpu_every_layer_gathers_its_own_weights():
    mesh = make_mesh(fsdp=4, devices=tpu_devices("v5e:2x2"))

    def program(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def counted(layers):
        over = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp"))]
        shapes = (64, 256), (layers, 256, 256)
        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=s) for shape, s in zip(shapes, over, strict=True)]
        text = jax.jit(program).lower(*given).compile().as_text()
        return sum(collectives_run(text).values()), sum(collective_bytes(text).values())

    (runs, size), (more, larger) = counted(6), counted(12)
    assert size >= 6 * 256 * 256 * 2 * 3 / 4 and (more, larger) == (2 * runs, 2 * size)

from para_jax.backbone.layout import periods
from para_jax.config import LayerKind, RotaryConfig

FULL = LayerKind(rotary=RotaryConfig(dims=8))
WINDOW = LayerKind(rotary=RotaryConfig(dims=8), window=16)


def test_layers_of_one_kind_are_one_run():
    assert periods((FULL,) * 7) == ((0, 1, 7),)


def test_alternating_layers_have_period_two():
    assert periods((WINDOW, FULL) * 3) == ((0, 2, 3),)


def test_a_rest_that_does_not_repeat_is_a_run_of_its_own():
    every_sixth = [FULL if i % 6 == 5 else WINDOW for i in range(26)]
    assert periods(tuple(every_sixth)) == ((0, 6, 4), (24, 1, 2))


def test_the_runs_cover_every_layer_once():
    for count in range(1, 20):
        kinds = tuple(FULL if i % 3 == 1 else WINDOW for i in range(count))
        layers = [start + i for start, period, repeats in periods(kinds) for i in range(period * repeats)]
        assert layers == list(range(count))
        for start, period, repeats in periods(kinds):
            assert kinds[start : start + period * repeats] == kinds[start : start + period] * repeats

"""The bank: tenants by name, of any method, rank and sites, in one batch; what it refuses, and what never disturbs."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts, strong
from long_cases import long

from para_jax import (
    AdapterBank,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    decode,
    forward,
    init_adapter,
    multi_tenant_forward,
    prefill,
    save_adapter,
)
from para_jax.adapters.adapter import named_leaves
from para_jax.config import SITES

NAMES = ["para", "ia3", None, "wide", "input", "rms", "last layer", "bias"]


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def tenants(model):
    """Strong adapters of every method, of different ranks and sites."""
    configs = {
        "para": ParaConfig(r=4),
        "wide": ParaConfig(r=8, target_modules=("q_proj", "up_proj")),
        "rms": ParaConfig(r=3, summary="rms", activation="silu"),
        "last layer": ParaConfig(r=5, layers_to_transform=(2,)),
        "bias": ParaConfig(r=4, up_bias=True, target_modules=("v_proj", "up_proj")),
        "ia3": Ia3Config(target_modules=("q_proj", "v_proj")),
        "input": Ia3Config(target_modules=("v_proj", "up_proj", "down_proj")),
        "lora": LoraConfig(r=4, lora_alpha=16),
        "rslora": LoraConfig(r=8, use_rslora=True, target_modules=SITES),
    }
    made = {
        name: strong(init_adapter(config, model.config, seed=i), i) for i, (name, config) in enumerate(configs.items())
    }
    return made


def filled(model, tenants, names, **options):
    bank = AdapterBank(model.config, max_r=8, **options)
    for name in names:
        bank.add(name, tenants[name])
    return bank


@pytest.fixture(scope="module")
def bank(model, tenants):
    return filled(model, tenants, [name for name in NAMES if name])


@pytest.fixture(scope="module")
def lora_bank(model, tenants):
    return filled(model, tenants, tenants, methods=("para", "ia3", "lora"), sites=SITES)


@pytest.mark.long
def test_a_fitting_bank_has_the_programs_of_all_its_adapters_whichever_it_holds(model, tenants):
    """The shapes of its rows are those of a bank that holds everything, so a row has the same bits."""
    names = ["para", "wide", "rms", "input", "lora"]
    configs = [tenants[name].normal(model.config).config for name in names]
    whole = AdapterBank.holding({name: tenants[name] for name in names}, model.config)
    rows = whole.rows([None, "wide"])
    for held in (["wide"], ["lora", "wide"], names):
        bank = AdapterBank.fitting([*configs, *configs], model.config, capacity=9)
        for name in held:
            bank.add(name, tenants[name])
        found = bank.rows([None, "wide"])
        assert jax.tree.structure(found) == jax.tree.structure(rows)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(rows), strict=True):
            np.testing.assert_array_equal(one, other)
        assert bank.carried == whole.carried and "rank 8" in bank.carried


@pytest.mark.parametrize(
    ("held", "names"), [("lora_bank", [*NAMES, "lora", "rslora", "lora", None]), long("bank", NAMES)], ids=str
)
def test_a_mixed_batch_of_all_methods_equals_each_tenant_alone(model, tenants, request, held, names):
    tokens = prompts(model, len(names))
    mixed = forward(model, request.getfixturevalue(held).rows(names), tokens, 8)
    base = forward(model, None, tokens, 8)
    np.testing.assert_array_equal(mixed[2], base[2])
    for i, name in enumerate(names):
        alone = forward(model, tenants.get(name), tokens[i : i + 1], 8)
        np.testing.assert_allclose(mixed[i], alone[0], atol=1e-4)
        assert name is None or abs(mixed[i] - base[i]).max() > 0.3, name


@pytest.mark.long
def test_the_batched_pass_equals_the_vmapped_reference(model, lora_bank):
    names = ["lora", "para", None, "input", "rslora"]
    tokens, rows = prompts(model, len(names)), lora_bank.rows(names)
    np.testing.assert_allclose(forward(model, rows, tokens, 8), multi_tenant_forward(model, rows, tokens, 8), atol=1e-4)


@pytest.mark.long
def test_decode_equals_the_teacher_forced_pass(model, lora_bank):
    names = ["lora", "para", None, "input", "rslora", "rms"]
    tokens, rows = prompts(model, len(names)), lora_bank.rows(names)
    expected = forward(model, rows, tokens, 8)
    logits, state = prefill(model, rows, tokens[:, :8], 8, max_length=12)
    for position in range(8, 12):
        np.testing.assert_allclose(logits, expected[:, position - 1], atol=1e-4)
        logits, state = decode(model, state, tokens[:, position])


def test_para_ia3_and_base_rows_share_one_decode_program(model, bank):
    states = []
    for names in (["para", "wide"], ["ia3", None], [None, None], ["rms", "input"]):
        states.append(
            jax.eval_shape(lambda rows: prefill(model, rows, prompts(model, 2), 8, max_length=16)[1], bank.rows(names))
        )
    assert all(jax.tree.structure(state) == jax.tree.structure(states[0]) for state in states)
    assert all(jax.tree.leaves(state) == jax.tree.leaves(states[0]) for state in states)
    lora = AdapterBank(model.config, methods=("lora",), max_r=4).rows([None, None])
    other = jax.eval_shape(lambda rows: prefill(model, rows, prompts(model, 2), 8, max_length=16)[1], lora)
    assert jax.tree.structure(other) != jax.tree.structure(states[0])


@pytest.mark.long
@pytest.mark.parametrize("methods", [("para",), ("lora",), ("para", "ia3", "lora")], ids=str)
def test_decode_carries_the_same_whatever_the_tenants_scopes(model, methods):
    bank = AdapterBank(model.config, methods=methods)

    def carried(name):
        rows = bank.rows([name])
        return jax.eval_shape(lambda: prefill(model, rows, prompts(model)[:1], 5, max_length=16)[1])

    empty, config = carried(None), {"para": ParaConfig, "lora": LoraConfig}[methods[-1]]
    for scope, window in (("prompt", 1), ("response", 1), ("all", 1), ("response", 3))[
        : 3 if config is ParaConfig else 4
    ]:
        bank.add(f"{scope}{window}", init_adapter(config(scope=scope, scope_window=window), model.config))
        assert carried(f"{scope}{window}") == carried(None) == empty


@pytest.mark.long
def test_no_compilation_while_tenants_come_go_and_mix(model, tenants, bank, compiled):
    """Counted by JAX's own events, once each method had each number of distinct tenants; the count rises on a batch of
    another size."""
    bank = filled(model, tenants, ["para", "ia3"], capacity=306)
    tokens = prompts(model, 4)

    def serve(names):
        _, state = prefill(model, bank.rows(names), tokens, 8, max_length=16)
        return jax.block_until_ready(decode(model, state, tokens[:, 0]))

    for i in range(3):
        bank.add(f"para{i}", tenants["para"]), bank.add(f"ia3{i}", tenants["ia3"])
    of_method = [[name for name in bank.names if name.startswith(method)] for method in ("para", "ia3")]
    for paras, ia3s in itertools.product(range(5), repeat=2):
        if paras + ia3s <= 4:
            serve([*of_method[0][:paras], *of_method[1][:ia3s], *[None] * (4 - paras - ia3s)])
    before = len(compiled)
    rng = np.random.default_rng(0)
    held = [init_adapter(ParaConfig(r=r), model.config, seed=r) for r in (1, 4, 8)]
    held += [init_adapter(Ia3Config(target_modules=("v_proj",)), model.config)]
    start = len(compiled)  # making the adapters compiles, serving them does not
    for i in range(298):
        bank.add(f"t{i}", held[i % 4])
    for i in range(15):
        bank.replace(f"t{rng.integers(200)}", held[rng.integers(4)])
        bank.remove(f"t{297 - i}")
        serve([None if rng.random() < 0.2 else bank.names[rng.integers(len(bank))] for _ in range(4)])
    assert before > 0 and len(compiled) == start
    prefill(model, bank.rows(["para"] * 3), tokens[:3], 8, max_length=16)
    assert len(compiled) > start


def test_replacing_or_removing_a_tenant_does_not_disturb_its_rows(model, tenants):
    tokens = prompts(model, 2)

    def decoded(disturb):
        bank = filled(model, tenants, ["para", "wide"])
        rows = bank.rows(["para", "wide"])
        if disturb:
            bank.replace("para", tenants["ia3"])
        logits, state = prefill(model, rows, tokens[:, :8], 8, max_length=12)
        if disturb:
            bank.remove("wide")
        steps = [logits]
        for position in range(8, 11):
            logits, state = decode(model, state, tokens[:, position])
            steps.append(logits)
            if disturb and position == 9:
                bank.add("wide", tenants["input"])
        return np.stack(steps), bank

    (calm, _), (disturbed, bank) = decoded(False), decoded(True)
    np.testing.assert_array_equal(calm, disturbed)
    after = forward(model, bank.rows(["para", "wide"]), tokens, 8)
    assert abs(after[:, 7] - calm[0]).max() > 0.1


def test_an_entry_keeps_method_config_version_and_content(model, tenants):
    bank = filled(model, tenants, ["para", "ia3"])
    first = bank.entry("para")
    assert (first.method, first.config) == ("para", tenants["para"].config)
    bank.replace("para", tenants["wide"])
    second = bank.entry("para")
    assert second.version > first.version and second.content != first.content
    bank.remove("para")
    bank.add("para", tenants["para"])
    again = bank.entry("para")
    assert again.content == first.content and again.version > second.version
    bigger = AdapterBank(model.config, max_r=16)
    bigger.add("x", tenants["para"])
    assert bigger.entry("x").content == first.content
    assert bank.names == ("ia3", "para") and "ia3" in bank and "wide" not in bank and len(bank) == 2
    assert str(bank) == f"2 of 1024 tenants (1 ia3, 1 para), {bank.nbytes / 1e6:.1f} MB of host memory"


def test_the_same_weights_with_another_config_have_another_content(model):
    """Else answers that were kept of one adapter would be taken for those of the other."""
    configs = LoraConfig(r=4), LoraConfig(r=4, lora_alpha=99), LoraConfig(r=4, scope="response")
    bank = AdapterBank(model.config, methods=("lora",))
    for i, config in enumerate(configs):
        bank.add(str(i), init_adapter(config, model.config))
    assert len({entry.content for entry in bank.entries}) == len(configs)


def test_an_adapter_comes_from_a_folder(model, tenants, tmp_path):
    save_adapter(tenants["para"], tmp_path / "a")
    bank = AdapterBank(model.config, methods=("para", "ia3", "lora"), sites=SITES)
    bank.add("ours", tmp_path / "a")
    bank.add("theirs", FIXTURES / "peft" / "lora_all")
    bank.add("scaled", FIXTURES / "peft" / "ia3")
    assert [bank.entry(name).method for name in bank.names] == ["para", "lora", "ia3"]
    assert "every row decodes with LoRA matrices of rank 16 on q_proj" in str(bank)


def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(model, tenants):
    bank, config = filled(model, tenants, ["para"]), model.config
    broken = strong(tenants["para"])
    broken.up["v_proj"][...] = broken.up["v_proj"][...].at[0, 0, 0].set(jnp.nan)
    wide = ParaConfig(r=4, late_r=28, target_modules=("q_proj", "o_proj"))
    for name, adapter, message in (
        ("para", tenants["ia3"], "'para' is held already"),
        ("x", init_adapter(wide, config), "x: PARA of r 28 .*sites=.'q_proj', 'v_proj', 'o_proj', 'up_proj'.*max_r=28"),
        ("x", tenants["lora"], "x: LoRA of r 4 .*para and ia3.*methods=.*'lora'"),
        ("x", init_adapter(ParaConfig(r=2), backbone("gemma").config), "another backbone"),
        ("x", broken, "bank: x: .*NaN.*up.v_proj"),
        ("x", "/nowhere", "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add(name, adapter)
        assert bank.names == ("para",)
    with pytest.raises(ValueError, match="methods .*para"):
        AdapterBank(config, methods=("dora",))


def test_unknown_names_are_refused_with_the_nearest_known_ones(model, tenants):
    bank = filled(model, tenants, ["para", "wide", "ia3", "input"])
    for call in (bank.rows, lambda names: bank.remove(names[0]), lambda names: bank.replace(names[0], tenants["ia3"])):
        with pytest.raises(ValueError, match="'wider'.*wide"):
            call(["wider"])
    with pytest.raises(ValueError, match="'zzz'.*para, wide, ia3 ..."):
        bank.rows(["para", "zzz"])


def test_a_full_bank_says_so_and_keeps_what_it_holds(model, tenants):
    bank = filled(model, tenants, ["para", "ia3"], capacity=2)
    with pytest.raises(ValueError, match="2 tenants, 'wide'"):
        bank.add("wide", tenants["wide"])
    bank.replace("ia3", tenants["wide"])
    assert bank.names == ("para", "ia3") and bank.entry("ia3").method == "para"
    bank.remove("para")
    bank.add("input", tenants["input"])


@pytest.mark.long
def test_a_bfloat16_bank_holds_half_the_bytes_and_says_nearly_the_same(model, tenants, bank):
    half = filled(model, tenants, [name for name in NAMES if name], dtype="bfloat16")
    tokens = prompts(model, len(NAMES))
    exact, rounded = (forward(model, b.rows(NAMES), tokens, 8) for b in (bank, half))
    assert half.nbytes < 0.6 * bank.nbytes
    assert 0 < abs(exact - rounded).max() < 0.1
    np.testing.assert_array_equal(exact[1], rounded[1])  # (IA)^3's vectors lie close to one: they stay float32
    dtypes = {leaf.ndim: leaf.dtype for leaf in jax.tree.leaves(half.rows(["para"]).stacks)}  # [places, layers, ...]
    assert dtypes[4] == jnp.bfloat16 and dtypes[3] == jnp.float32


def test_rows_take_the_bytes_of_their_distinct_tenants_rounded_up_to_a_power_of_two(model, tenants):
    """All groups have as many places as the one that needs most. More can be asked for, fewer cannot."""
    bank = filled(model, tenants, ["para", "wide", "ia3"])
    for i in range(5):
        bank.add(f"more {i}", tenants["para"])
    (one,) = {sum(leaf.nbytes for leaf in jax.tree.leaves(bank.rows([name]).stacks)) for name in ("para", None, "ia3")}
    paras = [f"more {i}" for i in range(5)]

    def places(names, *given):
        rows = bank.rows_of([name and bank.entry(name) for name in names], *given)
        stacks = jax.tree.leaves(rows.stacks)
        (found,) = {leaf.shape[0] for leaf in stacks}
        assert rows.batch == len(names) and sum(leaf.nbytes for leaf in stacks) == found * one
        return found

    for names, expected in [
        (["para"] * 32, 1), ([None] * 32, 1), (["para", "ia3", None] * 9, 1), (["para", "wide", "para", None], 2),
        (paras[:3] * 4, 4), (paras * 2, 8), (paras, 5), ([*paras[:3], "ia3"], 4), (["para", None, paras[0]], 2),
    ]:  # fmt: skip
        assert places(names) == expected, names
    assert places(["para"], 4) == 4 and places(paras, 2) == 5


def test_threads_that_add_remove_and_ask_meet_whole_tenants(model, tenants):
    bank = filled(model, tenants, ["para", "wide"])
    errors, content = [], {bank.entry(name).content for name in ("para", "wide")}

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for i in range(30):
                bank.add(f"{seed}-{i}", tenants["para"])
                bank.replace("wide", tenants[("para", "wide")[rng.integers(2)]])
                rows = bank.rows(["wide", "para"])
                assert rows.batch == 2 and bank.entry("wide").content in content
                bank.remove(f"{seed}-{i}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and bank.names == ("para", "wide")


@pytest.mark.long
def test_an_unused_config_is_dropped_and_its_rows_still_work(model):
    bank = AdapterBank(model.config, max_r=4)
    bank.add("a", strong(init_adapter(ParaConfig(r=4), model.config), 1, 0.3))
    fresh = len(bank.rows(["a"]).stacks)
    for i, options in enumerate(({"pooler": "mean"}, {"summary": "rms"}, {"pooler": "constant"})):
        bank.add(f"t{i}", strong(init_adapter(ParaConfig(r=4, **options), model.config), i, 0.3))
    bank.replace("t0", init_adapter(ParaConfig(r=2), model.config))
    kept = bank.entry("t1")
    assert len(bank.rows(["a"]).stacks) == fresh + 2
    before = forward(model, bank.rows(["t1", "a"]), prompts(model, 2), 8)
    for name in ("t0", "t1", "t2"):
        bank.remove(name)
    assert len(bank.rows(["a"]).stacks) == fresh
    after = forward(model, bank.rows_of([kept, bank.entry("a")]), prompts(model, 2), 8)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("compared", [False, long(True)])
def test_an_adapter_takes_its_own_rank_and_sites_in_memory_and_the_banks_in_rows(model, compared):
    configs = [
        ParaConfig(r=2, late_r=7, up_bias=True),
        ParaConfig(r=4, layers_to_transform=(0, 2), target_modules=("q_proj",)),
        Ia3Config(target_modules=("q_proj",)),
        LoraConfig(r=3, target_modules=("q_proj",)),
    ]
    adapters = {str(i): strong(init_adapter(config, model.config), 1) for i, config in enumerate(configs)}
    for dtype in ("bfloat16", "float32"):
        large = AdapterBank(model.config, max_r=8, methods=("para", "ia3", "lora"), sites=SITES, dtype=dtype)
        for name, adapter in adapters.items():
            before = large.nbytes
            large.add(name, adapter)
            small = AdapterBank.holding({"a": adapter}, model.config, dtype=dtype)
            own = 4 * sum(leaf.size for leaf in named_leaves(adapter).values())
            assert large.nbytes - before == small.nbytes <= own
    if not compared:
        return
    tokens = prompts(model, len(configs))
    mixed = forward(model, large.rows(adapters), tokens, 8)
    for i, adapter in enumerate(adapters.values()):
        np.testing.assert_allclose(mixed[i], forward(model, adapter, tokens[i : i + 1], 8)[0], atol=1e-4)

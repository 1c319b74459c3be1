"""`inspect --data` of many tenants: every tenant's counts and lengths, and the padded lengths of the whole run."""

import re

import pytest
from tiny_run import rows_of_text, run_config, run_folder, words, write_rows, write_tenants

from para_jax.cli import main
from para_jax.config import load_config, save_config
from para_jax.reports.inspect import data_report
from para_jax.runs.data_table import own_fields
from para_jax.runs.plan import plan_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tenants; the prompts of globex are long, and it has a tenant.yaml."""
    folder = run_folder(tmp_path_factory.mktemp("table"))
    write_tenants(folder / "tenants", {"acme": 20, "globex": 9, "initech": 12})
    rows = [row | {"prompt": words(range(20, 50))} for row in rows_of_text(9, seed=3)]
    write_rows(folder / "tenants" / "globex" / "train.jsonl", rows)
    (folder / "tenants" / "globex" / "tenant.yaml").write_text("train: {max_steps: 7}\neval: {metric: exact_match}\n")
    return folder


def tenants_config(folder, *overrides):
    given = f"data.tenants={folder / 'tenants'}", "train.rows_per_tenant=4", "data.buckets=2", "train.max_steps=null"
    return run_config(folder, *given, *overrides)


def test_the_table_has_every_tenant_and_the_lengths_are_those_of_the_run(folder, tmp_path, capsys):
    config = tenants_config(folder, "train.num_epochs=500")  # a short run has one length
    save_config(config, tmp_path / "run.yaml")
    assert main(["inspect", "--data", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("acme", "glob", "init"))
    }
    inputs = plan_run(config)
    for tenant in inputs.tenants:
        lengths, held = tenant.data.examples.lengths, "0" if tenant.name == "initech" else "6"
        expected = [len(lengths), held, "0" if held == "0" else "5", tenant.order.total_steps]
        expected += [f"{lengths.mean():.0f}", lengths.max(), max(len(e.completion_ids) for e in tenant.data.examples)]
        assert rows[tenant.name][:7] == list(map(str, expected))
    assert rows["globex"][7:] == ["exact_match", "max_steps", "7,", "metric", "exact_match"]
    assert rows["acme"][7:] == ["loss"]
    padded = " or ".join(str(bucket.length) for bucket in inputs.buckets)
    assert f"41 examples of 3 tenants; padded to {padded} tokens" in said and " or " in padded
    first = said[said.index("examples of the first tenant:") :]
    assert first.count("prompt: ") == 3 and "acme" in first and "globex" not in first
    packed = data_report(tenants_config(folder, "data.packing=true", "data.max_seq_length=64"))
    assert "packed into rows of 64 tokens" in packed


@pytest.mark.parametrize("overrides", [
    ["train.gradient_accumulation_steps=2"],
    ["train.batch_size=6", "train.per_device_batch_size=3"],
    ["data.packing=true", "data.max_seq_length=64"],
    ["sweep.learning_rate=[0.1, 0.2]", "train.rows_per_tenant=2", "train.gradient_accumulation_steps=2"],
])  # fmt: skip
def test_the_batches_of_one_data_set_are_those_of_its_run(folder, overrides):
    data = f"data.train={folder / 'tenants' / 'acme'}", "train.per_device_batch_size=4", "mesh.data=1"
    config = run_config(folder, *data, "train.max_steps=null", *overrides)
    inputs = plan_run(config)
    batches, said = inputs.tenants[0].order.total_steps, data_report(config).splitlines()[-1]
    assert f"; {batches} batches of {inputs.layout.tenant_rows} rows per epoch" in said
    assert all(f"{shape.length} tokens ({shape.completion} of completion)" in said for shape in inputs.buckets)
    assert ("packed into rows of" in said) == config.data.packing and said.count("completion") == len(inputs.buckets)


def odd_rows(labels, prompts=("w20 w21",)):
    return [{"prompt": prompts[i % len(prompts)], "completion": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("many", [False, True])
def test_what_is_odd_about_labels_and_prompts_is_shown_with_its_count(tmp_path, many):
    run_folder(tmp_path)
    rows = odd_rows(["w9", "W9", "w10", "w9", "w11", "W10"] * 4, ["w20 w21", "w20 ", "w30 w31 w32"])
    for split in ("validation", "test"):  # they have other answers
        (tmp_path / "data" / f"{split}.jsonl").unlink()
    for place in (tmp_path / "data", tmp_path / "tenants" / "acme"):
        write_rows(place / "train.jsonl", rows)
    write_rows(tmp_path / "tenants" / "globex" / "train.jsonl", odd_rows([f"w{i}" for i in range(20, 60)]))
    said = data_report((tenants_config if many else run_config)(tmp_path, "eval.metric=null"))
    whose = "acme: " if many else ""
    assert f"\n{whose}4 labels differ only in case: w10, W10, w9, W9\n" in said
    assert f"\n{whose}8 of 24 prompts end with a space" in said and said.count("end with a space") == 1
    if many:
        rows = {line.split()[0]: line for line in said.splitlines() if line.startswith(("acme ", "globex "))}
        assert "accuracy of 5 labels" in rows["acme"] and "exact_match" in rows["globex"]
    else:
        assert "metric: accuracy over the 5 different completions" in said
        assert "\nlabels: w9 8, W9 4, w10 4, w11 4, W10 4\n" in said


def test_nothing_odd_is_said_of_texts_and_a_given_metric_is_named(folder, tmp_path):
    texts = write_rows(tmp_path / "train.jsonl", odd_rows([f"w{i}" for i in range(20, 30)]))
    for data in (texts, folder / "data"):
        said = data_report(run_config(folder, f"data.train={data}"))
        assert "\nmetric: loss\n" in said and "differ" not in said and "with a space" not in said
        assert ("labels: " in said) == (data != texts)
    said = data_report(run_config(folder, f"data.train={texts}", "data.validation_split=0.05"))
    assert "data.validation_split=0.05 holds out none" in said
    assert "holds out none" not in data_report(run_config(folder, f"data.train={texts}", "data.validation_split=0.5"))


@pytest.mark.parametrize("many", [False, True])
def test_a_large_share_of_padding_is_named_by_inspect_and_once_by_the_run(folder, tmp_path, capsys, many):
    """With the share that more padded lengths would give."""
    for name, longest in (("short", 6), ("long", 90), ("middle", 30)):
        write_rows(
            tmp_path / name / "train.jsonl", [row | {"prompt": words([20] * longest)} for row in rows_of_text(48, 1)]
        )
    merged = "".join((tmp_path / name / "train.jsonl").read_text() for name in ("short", "long", "middle", "middle"))
    one = write_rows(tmp_path.parent / f"{tmp_path.name}.jsonl", [])
    one.write_text(merged)
    data = [f"data.tenants={tmp_path}", "train.rows_per_tenant=4"] if many else [f"data.train={one}"]
    for buckets, better in ((1, True), (2, False), (3, False)):
        config = run_config(folder, *data, f"data.buckets={buckets}", "train.max_steps=5000")
        said = data_report(config)
        inputs = plan_run(config)
        padded = real = 0
        for order in (tenant.order for tenant in inputs.tenants):
            for i in range(order.plan.batches_per_epoch):
                batch, tokens = order.batch(i, inputs.buckets[order.plan.batch_indices(i)[0]], order.plan.rows)
                padded, real = padded + batch.tokens.size, real + tokens
        share = f"{1 - real / padded:.0%} of the training rows' tokens are padding"
        assert share in said and ("at least" in said) == many
        assert ("data.buckets=2 makes it" in said) == better
        assert capsys.readouterr().err.count("tokens are padding") == better


def test_what_a_tenant_sets_is_shown_on_one_line():
    run, own = load_config(None), load_config(None, ["train.learning_rate=1e-2", 'eval.choices=[a, "b\\n\\e"]'])
    assert own_fields(run, run) == "" and own_fields(run, own) == r"learning_rate 0.01, choices ['a', 'b\n\x1b']"


@pytest.mark.parametrize("many", [False, True])
def test_held_out_examples_that_are_too_long_are_not_counted(tmp_path, many):
    run_folder(tmp_path)
    rows = rows_of_text(8, seed=2)
    rows = rows[:3] + [row | {"prompt": words(range(20, 50))} for row in rows[3:]]
    write_tenants(tmp_path / "tenants", {"acme": 9})
    for place in (tmp_path / "data", tmp_path / "tenants" / "acme"):
        write_rows(place / "validation.jsonl", rows)
    made = tenants_config if many else run_config
    said = data_report(made(tmp_path, "data.max_seq_length=16", "data.truncate=skip"))
    assert re.search(r"acme +9 +3 +5 ", said) if many else "also 3 validation and 5 test examples" in said
    with pytest.raises(ValueError, match=r"validation.jsonl:4: 3\d tokens exceed data.max_seq_length 16 \(5 of 8"):
        data_report(made(tmp_path, "data.max_seq_length=16"))

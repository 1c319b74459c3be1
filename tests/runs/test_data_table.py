"""`inspect --data` of many tenants: every tenant's counts and lengths, and the padded lengths of the whole run."""

import re

import pytest
from tiny_run import rows_of_text, run_config, run_folder, words, write_rows, write_tenants

from para_jax.cli import main
from para_jax.config import save_config
from para_jax.reports.inspect import data_report
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
    assert rows["globex"][7:] == ["exact_match", "max_steps", "7"]
    assert rows["acme"][7:] == ["loss"]
    assert "41 examples of 3 tenants; padded to " in said and len(inputs.buckets) > 1
    assert all(f"{bucket.length} tokens" in said for bucket in inputs.buckets)
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
    for buckets, large in ((1, True), (3, False)):
        config = run_config(folder, *data, f"data.buckets={buckets}", "train.max_steps=5000")
        capsys.readouterr()
        said = data_report(config)
        assert capsys.readouterr().err.count("tokens are padding") == large
        inputs = plan_run(config)
        padded = real = 0
        for order in (tenant.order for tenant in inputs.tenants):
            for i in range(order.plan.batches_per_epoch):
                batch, tokens = order.batch(i, inputs.buckets[order.plan.batch_indices(i)[0]], order.plan.rows)
                padded, real = padded + batch.tokens.size, real + tokens
        assert f"{1 - real / padded:.0%} of the training rows' tokens are padding" in said


def test_labels_are_counted_and_rows_that_are_held_out(folder, tmp_path):
    rows = [{"prompt": "w20 w21", "completion": label} for label in ["w9", "w10", "w9", "w11"] * 6]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    said = data_report(run_config(folder, f"data.train={labels}", "eval.metric=null"))
    assert "\nmetric: accuracy over 3 choices\nlabels: w9 12, w10 6, w11 6\n" in said
    texts = write_rows(tmp_path / "texts.jsonl", [row | {"completion": f"w{30 + i}"} for i, row in enumerate(rows)])
    said = data_report(run_config(folder, f"data.train={texts}", "data.validation_split=0.01"))
    assert "labels: " not in said


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

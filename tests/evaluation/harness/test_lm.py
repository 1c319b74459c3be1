"""ParaLM: one tenant of an engine as a model of lm-eval."""

import importlib.util
import json
import shutil
import sys

import pytest
from adapter_folder import change_config
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tiny_harness import command, lines, results
from tiny_run import words

import para_jax
from para_jax import AdapterBank, Engine, ParaLM, load_adapter, load_backbone, load_tokenizer
from para_jax.cli import main
from para_jax.evaluation import answers as answering
from para_jax.evaluation import task_questions
from para_jax.evaluation.questions import Written

TEMPLATE = "{% for m in messages %}w5 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"


def test_para_lm_knows_the_adapter_that_its_tenant_has_now(folder):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({"A": load_adapter(folder / "A" / "adapter", model.config)}, model.config)
    lm = ParaLM(Engine(model, bank, load_tokenizer(folder / "backbone"), slots=2, max_length=64), "A")
    before = lm.content
    bank.replace("A", load_adapter(folder / "B" / "adapter", model.config))
    assert lm.content == bank.entry("A").content != before


@pytest.mark.long
@pytest.mark.parametrize("tenant", ["A", None])
def test_para_lm_scores_one_tenant_as_the_mixed_pass_does(engine, harness, whole, tenant):
    found = harness(ParaLM(engine, tenant), "tiny_pick", "tiny_write")
    mixed = results(whole)[tenant or "base"]["results"]
    for task, metric in (("tiny_pick", "acc,none"), ("tiny_write", "exact_match,none")):
        assert found["results"][task][metric] == mixed[task][metric]
    likely = {one["logprob"] for one in map(json.loads, lines(whole)) if "logprob" in one}
    nats = [nats for sample in found["samples"]["tiny_pick"] for ((nats, _),) in sample["resps"]]
    assert len(nats) == 18 and set(nats) <= likely
    assert found["config"]["adapter"] == (engine.bank.entry(tenant).content if tenant else "base")


def test_para_lm_uses_the_chat_template(engine, harness, monkeypatch):
    lm = ParaLM(engine, "A")
    plain = lm.tokenizer_name
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    assert lm.tokenizer_name != plain
    found = harness(lm, "tiny_write", apply_chat_template=True, limit=2)
    assert all(sample["arguments"][0][0].startswith("w5 w") for sample in found["samples"]["tiny_write"])
    assert all(sample["arguments"][0][0].endswith(" w6") for sample in found["samples"]["tiny_write"])


def test_para_lm_cuts_contexts_to_the_engines_room(engine, monkeypatch, capsys):
    lm, asked = ParaLM(engine, "A"), []
    monkeypatch.setattr(lm, "answered", lambda given: asked.extend(given) or [Written("", 0)] * len(given))
    requests = [Instance("generate_until", {}, (words(range(20, 120)), {"max_gen_toks": 16}), 0, ("t", 0, 1))]
    assert lm.generate_until(requests) == [""] and len(asked[0].context) == 64 - 16
    assert "1 of 1 contexts lost their start, to fit into 64 tokens" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(lm.generate_until(requests)) == 1
    assert lm.max_gen_toks == 32


def test_a_cache_knows_the_adapter(engine, harness, tmp_path, monkeypatch):
    def logprobs(lm, **options):
        samples = harness(lm, "tiny_pick", limit=3, **options)["samples"]["tiny_pick"]
        return [sample["resps"] for sample in samples]

    first, other = (logprobs(ParaLM(engine, tenant, cache=tmp_path / "cache")) for tenant in "AB")
    assert first != other
    monkeypatch.setattr(answering, "likelihoods", lambda *_: iter(()))  # nothing is computed
    assert [logprobs(ParaLM(engine, tenant, cache=tmp_path / "cache")) for tenant in "AB"] == [first, other]


def test_lm_evals_own_cache_is_refused(engine, harness, tmp_path):
    with pytest.raises(ValueError, match="use_cache does not know which adapter answered"):
        harness(ParaLM(engine, "A"), "tiny_pick", use_cache=str(tmp_path / "theirs"))


def test_para_lm_is_made_of_lm_evals_arguments(folder, tmp_path):
    sources = f"pretrained={folder / 'backbone'},peft={folder / 'A' / 'adapter'}"
    made = get_model("para").create_from_arg_string(
        f"{sources},max_length=48,cache={tmp_path},allow_cpu=true",
        {"batch_size": 3, "max_batch_size": None, "device": None},
    )
    assert isinstance(made, ParaLM) and (made.engine.slots, made.engine.max_length) == (3, 48)
    assert made.tenant == str(folder / "A" / "adapter") and (tmp_path / "answers.jsonl").exists()
    naming = shutil.copytree(folder / "A" / "adapter", tmp_path / "naming")
    change_config(naming, base_model_name_or_path=str(folder / "backbone"))
    named = get_model("para").create_from_arg_obj({"adapter": naming, "allow_cpu": True})
    assert named.engine.model.config == made.engine.model.config, "without backbone=, the adapter names it"
    with pytest.raises(ValueError, match="model_args: bakbone .* backbone, adapter, dtype"):
        get_model("para").create_from_arg_obj({"bakbone": "x"})


def test_a_chat_template_has_the_variables_of_lm_evals_arguments(folder, tmp_path):
    shutil.copytree(folder / "backbone", tmp_path / "chats")
    chats = load_tokenizer(tmp_path / "chats")
    chats.chat_template = TEMPLATE + "{{ 'w8' if enable_thinking | default(true) else mood }}"
    chats.save_pretrained(tmp_path / "chats")
    asked, given = [{"role": "user", "content": "w20"}], {"backbone": tmp_path / "chats", "allow_cpu": True}
    variables = {"enable_thinking": False, "chat_template_args": {"mood": "w9"}}
    ends = {}
    for name, more in (("hf", variables), ("none", {})):
        lm = ParaLM.from_source(**given, **more)
        ends[name] = lm.apply_chat_template(asked)[-2:]
    assert ends == {"hf": "w9", "none": "w8"}
    for wrong in ("mood", {"messages": 1}):
        with pytest.raises(ValueError, match="model_args: chat_template_args.*(mood|messages)"):
            ParaLM.from_source(**given, chat_template_args=wrong)


@pytest.mark.long
def test_lm_evals_command_line_runs_para(folder, whole, tmp_path, monkeypatch):
    """Slow: lm-eval reads its ten thousand task files."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    args = f"backbone={folder / 'backbone'},adapter={folder / 'A' / 'adapter'},allow_cpu=true"
    line = f"lm-eval --tasks tiny_pick --include_path {folder / 'tasks'} --model_args {args}"
    assert main([*line.split(), "--output_path", str(tmp_path / "o.json")]) == 0
    (file,) = tmp_path.glob("o*.json")
    found = json.loads(file.read_text())
    assert found["results"]["tiny_pick"] == results(whole)["A"]["results"]["tiny_pick"]


def test_without_lm_eval_a_line_says_how_to_install_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task_questions, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for line in (command(folder, tmp_path, tasks=["tiny_pick"]), ["lm-eval", "--tasks", "x"]):
        assert main(line) == 2
        assert "pip install 'para_jax[eval]'" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith(("lm_eval.", "para_jax.evaluation.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="para_jax.ParaLM: lm-eval is not installed: pip install"):
        para_jax.ParaLM  # noqa: B018

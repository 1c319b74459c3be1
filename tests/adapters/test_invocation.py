"""An adapter with invocation tokens answers prompts that end with them, and no others: the rest is refused by name."""

from dataclasses import replace

import pytest
from golden_models import backbone, strong
from tiny_run import rows_of_text, run_config, run_folder, tokenizer, words, write_rows

from para_jax import (
    AdapterBank,
    Engine,
    LoraConfig,
    Request,
    generate,
    init_adapter,
    pick,
    stack_adapters,
    train,
)
from para_jax.adapters.scope import require_invocation

TOKENS = (7, 9)
CONFIG = LoraConfig(r=2, scope="response", scope_window=2, alora_invocation_tokens=TOKENS)
ENDS, OTHER = "w30 w7 w9", "w7 w9 w30"
REFUSED = r"must end with .*alora_invocation_tokens, \[7, 9\]; it ends with \[9, 30\]"


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def adapter(model):
    return strong(init_adapter(CONFIG, model.config), 1)


@pytest.fixture(scope="module")
def bank(model, adapter):
    bank = AdapterBank(model.config, methods=("lora", "para"))
    bank.add("alora", adapter)
    bank.add("plain", strong(init_adapter(LoraConfig(r=2), model.config), 2))
    return bank


def test_a_prompt_must_end_with_the_tokens_of_its_adapter():
    for prompt in ([7, 9], [7, 9, 7, 9]):
        require_invocation(CONFIG, prompt, "prompt")
    for prompt in ([7, 9, 3], [9], []):
        with pytest.raises(ValueError, match=r"^prompt 5 must .*\[7, 9\]"):
            require_invocation(CONFIG, prompt, "prompt 5")
    require_invocation(LoraConfig(), [1], "prompt")


@pytest.mark.long
def test_generate_refuses_other_prompts_before_anything_is_computed(model, adapter, bank):
    how = dict(tokenizer=tokenizer(), max_new_tokens=2)
    given = [dict(adapters=adapter), dict(adapters=pick(stack_adapters([adapter]), [0, 0]))]
    for adapters in [*given, dict(adapters=bank, tenants=["alora", "alora"])]:
        with pytest.raises(ValueError, match=f"prompt 1 {REFUSED}"):
            generate(model, [ENDS, OTHER], **how, **adapters)
        assert len(generate(model, [ENDS, ENDS], **how, **adapters)) == 2
    for tenants in (["alora", None], ["alora", "plain"]):
        assert len(generate(model, [ENDS, OTHER], **how, adapters=bank, tenants=tenants)) == 2
    assert len(generate(model, [ENDS, OTHER], **how, adapters=pick(stack_adapters([adapter]), [0, -1]))) == 2


@pytest.mark.long
def test_the_engine_answers_other_prompts_with_an_error(model, bank):
    engine = Engine(model, bank, tokenizer(), slots=2, max_length=32)
    asked = {}
    for prompt, tenant in ((ENDS, "alora"), (OTHER, "alora"), (OTHER, "plain"), (OTHER, None), ((7, 9, 30), "alora")):
        asked[engine.submit(Request(prompt, tenant, max_new_tokens=2))] = (prompt, tenant)
    errors = {asked[one.id]: one.error for one in engine.run()}
    refused = {key for key, error in errors.items() if error is not None}
    assert refused == {(OTHER, "alora"), ((7, 9, 30), "alora")}
    for key in refused:
        with pytest.raises(ValueError, match=f"prompt {REFUSED}"):
            raise ValueError(errors[key])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_run_refuses_data_with_other_prompts_and_names_the_first(tmp_path, split):
    folder = run_folder(tmp_path)
    for name in ("train", "validation"):
        rows = [{**row, "prompt": row["prompt"] + " w7 w9"} for row in rows_of_text(8, seed=1)]
        if name == split:
            rows[2]["prompt"], rows[5]["prompt"] = OTHER, words([4])
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    config = replace(run_config(folder), adapter=CONFIG)
    with pytest.raises(ValueError, match=rf"{split}.jsonl:3: the prompt {REFUSED}"):
        train(config)
    assert not (folder / "run").exists()

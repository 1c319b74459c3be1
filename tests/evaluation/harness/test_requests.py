"""lm-eval's requests as token ids: which tokens are context and which continuation, and what is refused."""

import pytest
from golden_models import backbone
from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text
from tiny_run import tokenizer as word_tokenizer
from tiny_tokenizers import own_space, with_bos
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax import generate
from para_jax.evaluation.harness.command import with_para
from para_jax.evaluation.harness.tasks import Recorder
from para_jax.evaluation.questions import Generation, Likelihood

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, but " c" is one, so that a boundary can fall into it; BOS and EOS are control bytes."""
    vocab = {piece: i for i, piece in enumerate([*ALPHABET, "Ġc"])}
    made = Tokenizer(models.BPE(vocab, [("Ġ", "c")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="Ā", eos_token="ā")


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def instances(kind, *arguments):
    return [Instance(kind, {}, argument, i, ("t", i, 1)) for i, argument in enumerate(arguments)]


def recorded(tokenizer, kind, *arguments, max_length=50, seed=0):
    recorder = Recorder(tokenizer, max_length, seed)
    getattr(recorder, kind)(instances(kind, *arguments))
    return recorder.questions


def test_spaces_at_a_contexts_end_belong_to_the_continuation(tokenizer):
    found = recorded(tokenizer, "loglikelihood", ("ab ", "cd"), ("ab", " cd"), ("ab", "cd"))
    whole = ids(tokenizer, "ab cd")
    assert whole[2] == len(ALPHABET)  # " c", which the boundary must not cut
    assert found[0] == found[1] == Likelihood(whole[:2], whole[2:])
    assert found[2] == Likelihood(ids(tokenizer, "ab"), ids(tokenizer, "cd"))


def test_bos_is_the_context_of_an_empty_one(tokenizer):
    bos = (tokenizer.bos_token_id,)
    found = recorded(tokenizer, "loglikelihood", ("", "ab"), ("  ", "ab"), ("", tokenizer.bos_token + "ab"))
    assert found[0] == Likelihood(bos, ids(tokenizer, "ab"))
    assert found[1] == Likelihood(bos, ids(tokenizer, "  ab"))
    assert found[2] == Likelihood(bos, ids(tokenizer, "ab"))
    assert recorded(tokenizer, "generate_until", ("", {"max_gen_toks": 4}))[0].context == bos


def test_a_context_that_is_too_long_loses_its_start(tokenizer):
    letters = "abdefghijk"
    found = recorded(tokenizer, "loglikelihood", (letters, "xyz"), max_length=8)[0]
    assert found == Likelihood(ids(tokenizer, letters)[-6:], ids(tokenizer, "xyz"))  # the last token is never read
    written = recorded(tokenizer, "generate_until", (letters, {"max_gen_toks": 3}), max_length=8)[0]
    assert written.context == ids(tokenizer, letters)[-5:]
    with pytest.raises(ValueError, match="10 tokens and leaves no room for a context"):
        recorded(tokenizer, "loglikelihood", ("a", letters), max_length=8)
    with pytest.raises(ValueError, match="max_gen_toks: 8 .* the model's positions"):
        recorded(tokenizer, "generate_until", ("a", {"max_gen_toks": 8}), max_length=8)


def test_written_answers_fit_the_engine_and_likelihoods_use_all_positions(tokenizer, capsys):
    recorder = Recorder(tokenizer, 20, 0, room=8)
    requests = instances("generate_until", ("abdefghijk", {"max_gen_toks": 3}), ("ab", {}))
    recorder.generate_until(requests)
    assert [len(one.context) for one in recorder.questions] == [5, 2] and recorder.questions[1].max_new_tokens == 4
    assert "1 of 2 contexts lost their start, to fit into 8 tokens" in capsys.readouterr().err
    recorder.loglikelihood(instances("loglikelihood", ("abdefghijk", "xyz")))
    assert len(recorder.questions[2].context) == 10 and "lost" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_gen_toks: 8 .* the engine's max_length"):
        recorder.generate_until(instances("generate_until", ("a", {"max_gen_toks": 8})))


def test_a_continuation_without_a_token_is_an_error():
    with pytest.raises(ValueError, match="continuation ' ' has no token of its own"):
        recorded(word_tokenizer(), "loglikelihood", ("w3", " "))


def test_what_is_written_ends_where_the_task_says(tokenizer):
    asked = recorded(
        tokenizer,
        "generate_until",
        ("ab", {"until": ["\n", ""], "max_gen_toks": 7}),
        ("ab", {"until": "x", "max_new_tokens": 5}),
        ("ab", {"temperature": 0.7, "do_sample": False, "top_p": 0.5, "max_gen_toks": 4}),
    )
    context = ids(tokenizer, "ab")
    assert asked[0] == Generation(context, 7, ("\n",)) and asked[1] == Generation(context, 5, ("x",))
    assert recorded(tokenizer, "generate_until", ("ab", {}), max_length=600)[0].max_new_tokens == 256
    assert recorded(tokenizer, "generate_until", ("ab", {}), max_length=100)[0].max_new_tokens == 50
    assert asked[2].temperature == 0 and asked[2].top_p == 1


SAMPLED = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_gen_toks": 4}


def seeds(tokenizer, requests, seed=7):
    recorder = Recorder(tokenizer, 50, seed)
    recorder.generate_until(requests)
    return [one.seed for one in recorder.questions]


def test_repeats_differ_if_they_are_sampled_and_not_if_greedy(tokenizer):
    asked = recorded(tokenizer, "generate_until", *[("a", SAMPLED)] * 2, ("b", SAMPLED), seed=7)
    assert len({one.seed for one in asked}) == 3 and asked[0][3:6] == (0.5, 5, 0.9)
    assert len(set(recorded(tokenizer, "generate_until", *[("a", {"max_gen_toks": 4})] * 3))) == 1


def test_a_documents_seed_depends_on_nothing_else_that_is_asked(tokenizer):
    """Two documents of one prompt, one of another prompt, and the first in another task; each twice."""
    documents = [("t", {"q": 1}, "a"), ("t", {"q": 2}, "a"), ("t", {"q": 1}, "b"), ("u", {"q": 1}, "a")]
    requests = [
        Instance("generate_until", document, (prompt, SAMPLED), 0, (task, i, 2))
        for i, (task, document, prompt) in enumerate(documents)
        for _ in range(2)
    ]
    found = seeds(tokenizer, requests)
    assert len(set(found)) == 8 and all(0 <= seed < 2**32 for seed in found)
    assert seeds(tokenizer, requests[4:]) == found[4:]
    turned = seeds(tokenizer, [requests[i] for i in (6, 2, 0, 4, 1, 3, 5, 7)])
    assert turned == [found[i] for i in (6, 2, 0, 4, 1, 3, 5, 7)]
    assert not set(seeds(tokenizer, requests, seed=8)) & set(found)
    said = [Instance("generate_until", {}, ("a", SAMPLED | {"seed": 0}), 0, ("t", 0, 1))]
    assert seeds(tokenizer, said, seed=7) == seeds(tokenizer, said, seed=8)


def test_what_is_not_computed_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="generation_kwargs: num_beams, typical_p"):
        recorded(tokenizer, "generate_until", ("a", {"num_beams": 4, "typical_p": 0.3, "max_gen_toks": 4}))
    recorded(tokenizer, "generate_until", ("a", {"num_beams": 1, "max_gen_toks": 4}))
    with pytest.raises(ValueError, match="loglikelihood_rolling"):
        recorded(tokenizer, "loglikelihood_rolling", ("a",))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Recorder(tokenizer, 50, 0).apply_chat_template([{"role": "user", "content": "a"}])
    for name, value in (("top_p", 2.0), ("top_k", -1)):
        with pytest.raises(ValueError, match=name):
            recorded(tokenizer, "generate_until", ("a", SAMPLED | {name: value}))


GEMMA = (  # the first line of Gemma 1's and 2's template, and the turns
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}


@pytest.mark.parametrize("prompted", [True, False])
def test_a_template_without_system_role_gets_the_chat_without_it_as_in_hf(tokenizer, prompted, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "chat_template", GEMMA)
    recorder = Recorder(tokenizer, 50, 0)
    expected = "Ā<start_of_turn>user\nab" + "<start_of_turn>model\n" * prompted
    for messages in ([SYSTEM, USER], [USER], [SYSTEM, USER]):
        assert recorder.apply_chat_template(messages, add_generation_prompt=prompted) == expected
    assert capsys.readouterr().err.count("System role not supported") == 1


def test_an_answer_to_a_chat_ends_with_the_turn():
    recorder = Recorder(with_bos(), 50, 0)
    recorder.generate_until(instances("generate_until", ("a", {"max_gen_toks": 4})))
    text = recorder.apply_chat_template([USER])
    recorder.generate_until(instances("generate_until", (text, {"max_gen_toks": 4})))
    end = with_bos().convert_tokens_to_ids("<end_of_turn>")
    assert [one.stop_ids for one in recorder.questions] == [(), (end,)] and end != with_bos().eos_token_id


def test_a_stop_text_with_a_first_space_is_missed_at_the_start_as_in_hf(monkeypatch):
    """SentencePiece's tokenizers strip the first space of what they decode, and all decode the answer alone."""
    tokenizer, model = own_space(), backbone("llama")
    for answer, expected in (("quick brown fox", "quick brown fox"), ("the quick brown fox", "the")):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]  # as of " " + answer
        monkeypatch.setattr("para_jax.inference.generate.generate_tokens", lambda *_, ids=ids, **__: [ids])
        theirs = postprocess_generated_text(tokenizer.decode(ids, skip_special_tokens=True), [" quick"], None)
        assert generate(model, ["a"], tokenizer=tokenizer, stop=[" quick"]) == [theirs] == [expected]


@pytest.mark.parametrize(
    "given", ["ls tasks", "--model hf --tasks x", "--config=c.yaml", "--tasks x -M para-completions"]
)
def test_lm_evals_arguments_may_name_another_model(given):
    assert with_para(given.split()) == given.split()


def test_lm_evals_arguments_get_the_model_para():
    assert with_para(["--tasks", "x"]) == "--tasks x --model para --batch_size 8".split()
    assert with_para(["--tasks", "x", "--batch_size=2"]) == "--tasks x --batch_size=2 --model para".split()

"""lm-eval's requests as token ids: which tokens are context and which continuation, and what is refused."""

import pytest
from lm_eval.api.instance import Instance
from tiny_run import tokenizer as word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax.evaluation.asked import Generation, Likelihood
from para_jax.evaluation.lm_eval_tasks import Recorder
from para_jax.evaluation.para_lm import with_para

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
    return recorder.asked


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
    with pytest.raises(ValueError, match="max_gen_toks: 8; expected less than the model's 8 positions"):
        recorded(tokenizer, "generate_until", ("a", {"max_gen_toks": 8}), max_length=8)


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


def test_repeats_of_a_sampled_request_are_different_samples_and_those_of_a_greedy_one_are_not(tokenizer):
    how = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_gen_toks": 4}
    asked = recorded(tokenizer, "generate_until", ("a", how), ("a", how), ("b", how), seed=7)
    assert [one.seed for one in asked] == [7, 8, 7] and asked[0][3:6] == (0.5, 5, 0.9)
    assert len(set(recorded(tokenizer, "generate_until", *[("a", {"max_gen_toks": 4})] * 3))) == 1


def test_what_is_not_computed_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="generation_kwargs: num_beams, typical_p is not computed here"):
        recorded(tokenizer, "generate_until", ("a", {"num_beams": 4, "typical_p": 0.3, "max_gen_toks": 4}))
    recorded(tokenizer, "generate_until", ("a", {"num_beams": 1, "max_gen_toks": 4}))
    with pytest.raises(ValueError, match="loglikelihood_rolling is refused: .* PARA makes its vectors of the prompt"):
        recorded(tokenizer, "loglikelihood_rolling", ("a",))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Recorder(tokenizer, 50, 0).apply_chat_template([{"role": "user", "content": "a"}])


def test_bos_is_not_put_before_a_text_that_has_it(tokenizer):
    recorder = Recorder(word_tokenizer(), 50, 0)
    recorder.tokenizer = type("Adds", (), {
        "bos_token_id": 1, "eos_token_id": 2, "decode": lambda self, ids: "<s>",
        "__call__": lambda self, text, add_special_tokens=True, **_: {"input_ids": [1] * add_special_tokens + [9]},
    })()  # fmt: skip
    assert recorder.tok_encode("a") == [1, 9] and recorder.tok_encode("<s>a") == [9]
    assert recorder.tok_encode("a", add_special_tokens=False) == [9]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("ls tasks", "ls tasks"),
        ("", ""),
        ("run --help", "run --help"),
        ("--model hf --tasks x --use_cache c", "--model hf --tasks x --use_cache c"),
        ("--config c.yaml", "--config c.yaml"),
        ("--tasks x", "--tasks x --model para --batch_size 8"),
        ("run --tasks x -b 2", "run --tasks x -b 2 --model para"),
        ("-M para --tasks x --use_cache=c", "--tasks x --model para --batch_size 8 --model_args cache=c"),
        ("--use_cache c --tasks x", "--tasks x --model para --batch_size 8 --model_args cache=c"),
    ],
)
def test_lm_evals_arguments_get_the_model_para_and_a_cache_that_knows_the_adapter(given, made):
    assert with_para(given.split()) == made.split()

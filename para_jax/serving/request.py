"""A request to the engine, and its answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..data.examples import Ids, Prompt
from ..inference.sampling import Sampling, is_whole
from ..io.checks import shorten

if TYPE_CHECKING:  # it imports JAX, and the command line checks requests before that
    from ..inference.logprobs import TokenLogprob

#: The most samples of a request.
MAX_SAMPLES = 128


@dataclass(frozen=True)
class Request:
    """One prompt for one tenant. Nothing is checked here: the engine answers a wrong request with an error."""

    prompt: Prompt | Ids
    """a text, chat messages, or a tuple of token ids"""
    tenant: str | None = None
    """a name of the bank; None: the base model"""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    """sample i is drawn with seed + i, so it does not depend on other requests. None: the engine derives a seed from
    its own and the request's number"""
    stop: str | tuple[str, ...] = ()
    """texts that end an answer, special tokens too"""
    n: int = 1
    """samples, at most 128. The engine keeps the last 4 prompts, so the prompt is prefilled again for a sample that
    starts after 4 others"""
    num_beams: int = 1
    """beams of a beam search, whose `n` best answers are given; 1: none. Each beam takes a slot, all begin together,
    and while they decode, every row decodes one token per round. The engine's max_logprobs must be num_beams and the
    number of end tokens, at least"""
    length_penalty: float = 1.0
    """a beam's score is the sum of its log-probabilities / length**length_penalty"""
    id: Hashable = None
    """None: the engine gives a number"""
    stop_token_ids: tuple[int, ...] = ()
    """ids that end an answer, in addition to the engine's"""
    ignore_eos: bool = False
    """decode past the end tokens of tokenizer, model and chat template: for benchmarks. `stop` and `stop_token_ids`
    still end an answer"""
    keep_end: bool = False
    """whether the answer's tokens, and their log-probabilities, include the token that ends it, for policy gradients.
    The text never does"""
    strip: bool = True
    """whether the answer's text leaves out the white space at its ends, such as the space that training puts after a
    prompt. Its tokens, and where a stop text ends it, stay as they are"""
    alone: bool = False
    """decode the answer without its prompt, as lm-eval's `hf` does: with SentencePiece tokenizers (Llama 2), the space
    before its first word is then no part of the text that `strip=False` keeps"""
    logprobs: int | None = None
    """alternatives per new token, at most the engine's max_logprobs; 0: the token's own log-probability alone; None: no
    log-probabilities"""
    prompt_logprobs: int | None = None
    """the same for each token of the prompt but the first, from one teacher-forced pass. n must be 1, and
    max_new_tokens may be 0"""
    context_length: int | None = None
    """with prompt_logprobs: how many of the prompt's tokens the adapter reads as its prompt. The others are scored as
    its completion, and at most one more token of it is drawn. Adapters whose result depends on where the prompt ends
    need it: those that read the prompt, and all scopes but `all`"""
    structured_outputs: dict | None = None
    """what the answer must be, as vLLM has it: {"json": schema}, {"json_object": True}, {"regex": pattern},
    {"choice": texts} or {"grammar": rules in Lark's syntax}. One that ends by itself is of that form; one that
    max_new_tokens cuts is the beginning of one. JSON is written as json.dumps does it"""
    cache_salt: str | None = None
    """The prompt shares its beginning only with prompts of the same salt. So no one without the
    salt can learn from times or cached_tokens what others have sent"""

    @property
    def sampling(self) -> Sampling:
        """The fields that say how answers are sampled. Raises ValueError for a wrong one."""
        seed = 0 if self.seed is None else self.seed
        beams = self.num_beams, self.length_penalty
        return Sampling(self.most_tokens, self.temperature, self.top_k, self.top_p, seed, self.stop, *beams)

    @property
    def most_tokens(self) -> int:
        """`max_new_tokens`, and 1 where that is 0 and the prompt alone is scored: the same pass draws a token."""
        alone = self.prompt_logprobs is not None and is_whole(self.max_new_tokens) and self.max_new_tokens == 0
        return 1 if alone else self.max_new_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop`, as a tuple also where it is one text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Completion(NamedTuple):
    """The answer to sample `index` of request `id`."""

    id: Hashable
    index: int
    text: str
    """without white space at its ends, unless the request's `strip` is False"""
    tokens: list[int]
    """without the token that ended it, unless the request's `keep_end` is set"""
    finish_reason: str
    """stop | length | error"""
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    """of each of `tokens`, also of those with text that a stop text or white space cuts; None where not asked for"""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """of each token of the prompt; the first is None"""
    prompt_tokens: int = 0
    """tokens of the prompt; 0 for a request that was refused"""
    score: float | None = None
    """of an answer of a beam search"""


class Piece(NamedTuple):
    """A part of an answer from `Engine.stream`: what has become certain of sample `index` since its last piece. The
    texts of a sample's pieces, joined, are its Completion's text, and so are the tokens."""

    index: int
    text: str
    """perhaps empty: half a character, what may begin a stop text, and white space come with a later piece"""
    tokens: list[int]
    finish_reason: str | None = None
    """stop | length | error, in the sample's last piece; before that None"""
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    """of each of `tokens`, as in Completion"""


def check_request(request: Request) -> None:
    """Raises ValueError that names a wrong field and says what to give. Whether the prompt and its tenant fit an engine
    is seen there."""
    n, scored = request.n, request.prompt_logprobs is not None
    _ = request.sampling  # which checks itself
    if not is_whole(n) or not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"n is {shorten(n)}; give a whole number from 1 to {MAX_SAMPLES}")
    if scored and n > 1:
        raise ValueError(f"prompt_logprobs: the prompt of {n} samples is the same; ask for them with n=1")
    if request.num_beams > 1:
        given = {"structured_outputs": request.structured_outputs, "prompt_logprobs": request.prompt_logprobs}
        given |= {"logprobs": request.logprobs}
        if n > request.num_beams:
            raise ValueError(f"n is {n}; give at most num_beams, {request.num_beams}")
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]} and num_beams do not go together; leave one of them out")
    if request.structured_outputs is not None and (scored or request.ignore_eos):
        name = "prompt_logprobs" if scored else "ignore_eos"
        raise ValueError(f"structured_outputs and {name} do not go together; leave one of them out")
    if request.context_length is not None and not scored:
        raise ValueError(
            f"context_length is {request.context_length}, but no scores are asked for; give prompt_logprobs too"
        )

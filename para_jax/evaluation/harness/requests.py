"""TokenLM: lm-eval's requests as questions, tokenised as lm-eval's own `hf` model does, so that scores are comparable.

Three LMs build on it: one that records questions and one that replays answers (tasks.py), and ParaLM (lm.py), which
computes them. This module needs lm-eval.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from ...data.chats import render, without_system
from ...data.examples import encode, encode_text, turn_stop_ids
from ...inference.sampling import derived_seed
from ...io.messages import say
from ...serving.request import check_request
from ..questions import Answer, Generation, Likelihood, Question, Scored, Written
from ..writing import as_request

#: Generation settings that are not used here, with the values that change nothing.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "use_cache": True}
NO_PROMPT = (
    "loglikelihood_rolling is refused: it scores a whole text, which has no prompt, and PARA makes its vectors from "
    "the prompt. Choose a task with contexts and continuations, or with answers to write"
)


class TokenLM(TemplateLM):
    """An LM that turns requests into questions, and takes their answers from `answered`."""

    def __init__(self, tokenizer, max_length: int, seed: int = 0, *, room: int | None = None):
        """
        Args:
            max_length: the model's positions; longer contexts lose their start, as in `hf`.
            room: a context and the answer to write after it have at most this many tokens; default: max_length.
            seed: of sampled answers. Each document, and each repeat of its request, has its own seed, derived from this
                one and the document: the same in any order and batch.
        """
        super().__init__()
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed
        self.room = min(room or max_length, max_length)
        self.max_gen_toks = min(256, self.room // 2)  # if a task does not say: 256, as in `hf`
        self._cut = 0
        self._without_system = False
        self._stop_ids: tuple[int, ...] | None = None

    def answered(self, questions: list[Question]) -> Sequence[Answer]:
        """The questions' answers."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- lm-eval's requests

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        asked = [self.likelihood(*request) for request in requests]
        self._say_cut(len(asked), self.max_length)
        found = [(answer.logprob, answer.greedy) for answer in self.answered(list(asked)) if isinstance(answer, Scored)]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked: list[Question] = []
        times: Counter = Counter()
        for request in requests:
            one = self.generation(*request.args)
            if one.temperature > 0:
                place = (str(request.task_name), repr(request.doc), request.idx, request.args[0])
                asked.append(one._replace(seed=derived_seed(one.seed, *place, times[place, one])))
                times[place, one] += 1
            else:
                asked.append(one)
        self._say_cut(len(asked), self.room)
        texts = [answer.text for answer in self.answered(asked) if isinstance(answer, Written)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise ValueError(NO_PROMPT)

    # ------------------------------------------------------------------------------------------------ texts to tokens

    def likelihood(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Likelihood:
        """The question of a request. Its context loses its start if the model has too few positions."""
        if not continuation:
            raise ValueError(f"a request's continuation {texts[1]!r:.80} has no token of its own")
        context = context or [self.prefix_token_id]  # a context of white space belongs to the continuation
        ids = context + continuation
        kept = ids[-(self.max_length + 1) :]  # the last token is predicted, never read
        self._cut += len(kept) < len(ids)
        if len(continuation) >= len(kept):
            raise ValueError(
                f"a request's continuation has {len(continuation)} tokens and leaves no room for a context in the "
                f"model's {self.max_length} positions"
            )
        return Likelihood(tuple(kept[: -len(continuation)]), tuple(continuation))

    def generation(self, context: str, how: dict) -> Generation:
        """The question of a request. Raises ValueError for a setting that is not supported, by name."""
        settings: dict = dict(normalize_gen_kwargs(how, self.max_gen_toks))
        until = settings.pop("until", None) or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        new, heat = settings.pop("max_gen_toks"), float(settings.pop("temperature", None) or 0)
        sampled = bool(settings.pop("do_sample", False)) and heat > 0
        top_k, top_p, seed = (settings.pop(name, None) for name in ("top_k", "top_p", "seed"))
        other = [name for name, value in settings.items() if value not in (None, NEUTRAL.get(name))]
        if other:
            raise ValueError(f"generation_kwargs: {', '.join(other)} is not supported; remove it from the task")
        if new >= self.room:
            whose = "the model's positions" if self.room == self.max_length else "the engine's max_length"
            raise ValueError(f"max_gen_toks: {new} leaves no room for a context in the {self.room} tokens of {whose}")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        kept = ids[-(self.room - new) :]
        self._cut += len(kept) < len(ids)
        made = Generation(tuple(kept), new, stop, stop_ids=self._stop_ids or ())
        if sampled:
            made = made._replace(temperature=heat, top_k=int(top_k or 0), top_p=float(1 if top_p is None else top_p))
        check_request(as_request("", None, made))
        return made._replace(seed=self.seed if seed is None else int(seed)) if sampled else made

    def _say_cut(self, requests: int, room: int) -> None:
        if self._cut:
            say(f"{self._cut} of {requests} contexts lost their start, to fit into {room} tokens")
        self._cut = 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens, as of a prompt elsewhere."""
        return (encode if add_special_tokens is False else encode_text)(self.tokenizer, string)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: BOS, or EOS if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    # ----------------------------------------------------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text. As in `hf`, a template that refuses it gets it without its system messages. Raises
        ValueError if it still fails, and for any other error in the template."""
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; run the task without one")
        try:
            text = self._render(chat_history, add_generation_prompt)
        except ValueError as error:
            rest = without_system(chat_history)
            if not rest or len(rest) == len(chat_history):
                raise
            text = self._render(rest, add_generation_prompt)
            if not self._without_system:
                self._without_system = True
                say(f"system messages are left out: {error}")
        self._chats()
        return text

    def _chats(self) -> None:
        """From now on, contexts are chats, so answers end with the turn."""
        if self._stop_ids is None:
            self._stop_ids = turn_stop_ids(self.tokenizer, [{"role": "user", "content": "a"}])

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        how = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        return render(self.tokenizer, messages, **how)

    @property
    def tokenizer_name(self) -> str:
        """Name and chat template, on which the requests that lm-eval caches depend."""
        self._chats()  # lm-eval asks for the name only if contexts are chats
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:8]
        return f"{self.tokenizer.name_or_path or 'tokenizer'}-{template}".replace("/", "__")

"""What lm-eval's tasks ask, as token ids: tokenised as lm-eval's own `hf` model does it, so that scores compare.

Three LMs stand on this one: one that records questions and one that replays answers (lm_eval_tasks.py), and ParaLM,
which computes them. This module needs lm-eval.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from ..data.examples import encode, without_added_eos
from .asked import Answer, Asked, Generation, Likelihood, Scored, Written

#: What a task may say of generation beside what is used here: values that change nothing.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "use_cache": True}
NO_PROMPT = (
    "loglikelihood_rolling is refused: it scores a whole text, which has no prompt, and PARA makes its vectors of the "
    "prompt; take a task of contexts and continuations, or of answers to be written"
)


class TokenLM(TemplateLM):
    """An LM whose answers come from `answered`, of questions as token ids."""

    def __init__(self, tokenizer, max_length: int, seed: int = 0):
        """
        Args:
            max_length: tokens that the model has positions for; longer contexts lose their start, as in `hf`.
            seed: of sampled answers; the i-th repeat of a request is drawn with seed + i.
        """
        super().__init__()
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed
        self.max_gen_toks = min(256, max_length // 2)  # where a task does not say it: 256, as in `hf`

    def answered(self, asked: list[Asked]) -> Sequence[Answer]:
        """The questions' answers."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- lm-eval's requests

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        asked = [self.likelihood(*request) for request in requests]
        found = [(answer.logprob, answer.greedy) for answer in self.answered(list(asked)) if isinstance(answer, Scored)]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked: list[Asked] = []
        times: Counter[Generation] = Counter()
        for request in requests:
            one = self.generation(*request.args)
            if one.temperature > 0:  # repeats of a sampled request are different samples
                times[one] += 1
                one = one._replace(seed=(one.seed + times[one] - 1) % 2**32)
            asked.append(one)
        texts = [answer.text for answer in self.answered(asked) if isinstance(answer, Written)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise ValueError(NO_PROMPT)

    # ------------------------------------------------------------------------------------------------ texts to tokens

    def likelihood(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Likelihood:
        """The question of a request, whose context is cut at its start to what the model has positions for."""
        if not continuation:
            raise ValueError(f"a request's continuation {texts[1]!r:.80} has no token of its own")
        context = context or [self.prefix_token_id]  # of white space alone, which belongs to the continuation
        kept = (context + continuation)[-(self.max_length + 1) :]  # the last token is predicted, never read
        if len(continuation) >= len(kept):
            raise ValueError(
                f"a request's continuation has {len(continuation)} tokens and leaves no room for a context in the "
                f"model's {self.max_length} positions"
            )
        return Likelihood(tuple(kept[: -len(continuation)]), tuple(continuation))

    def generation(self, context: str, how: dict) -> Generation:
        """The question of a request; raises ValueError for what is not computed here, by name."""
        settings: dict = dict(normalize_gen_kwargs(how, self.max_gen_toks))
        until = settings.pop("until", None) or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        new, heat = settings.pop("max_gen_toks"), float(settings.pop("temperature", None) or 0)
        sampled = bool(settings.pop("do_sample", False)) and heat > 0
        top_k, top_p, seed = (settings.pop(name, None) for name in ("top_k", "top_p", "seed"))
        other = [name for name, value in settings.items() if value not in (None, NEUTRAL.get(name))]
        if other:
            raise ValueError(f"generation_kwargs: {', '.join(other)} is not computed here; take it out of the task")
        if new >= self.max_length:
            raise ValueError(f"max_gen_toks: {new}; expected less than the model's {self.max_length} positions")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        greedy = Generation(tuple(ids[-(self.max_length - new) :]), new, stop)
        if not sampled:
            return greedy
        draw = dict(top_k=int(top_k or 0), top_p=float(1 if top_p is None else top_p), seed=int(seed or self.seed))
        return greedy._replace(temperature=heat, **draw)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens unless it starts with the BOS text already."""
        bos = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is False or (add_special_tokens is None and string.startswith(bos)):
            return encode(self.tokenizer, string)
        return without_added_eos(self.tokenizer, string, self.tokenizer(string, verbose=False)["input_ids"])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in the place of an empty context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    # ----------------------------------------------------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; run the task without one")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        """Name and chat template: what requests that lm-eval caches depend on."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:8]
        return f"{self.tokenizer.name_or_path or 'tokenizer'}-{template}".replace("/", "__")

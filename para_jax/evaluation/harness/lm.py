"""ParaLM: one tenant of an engine as a model of lm-eval. This module needs lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.registry import register_model

from ...adapters.bank import AdapterBank
from ...adapters.files import load_adapter
from ...backbone.content import backbone_content
from ...backbone.load import load_backbone
from ...config import RuntimeSection, template_variables
from ...data.tokenizer import load_tokenizer
from ...io.checks import expanded, shorten
from ...io.hub import BUILT_IN, backbone_of
from ...runtime import devices
from ...serving.engine import Engine
from ..answers import Answerer
from ..journal import AnswerJournal
from ..questions import Answer, Question
from .requests import TokenLM


@register_model("para")
class ParaLM(TokenLM):
    """One tenant of an engine, as a model of lm-eval. Its adapter reads the context of a request, never the
    continuation.

    >>> lm = ParaLM(Engine(model, bank, tokenizer, slots=2, max_length=64, max_logprobs=1), "acme")
    """

    def __init__(self, engine: Engine, tenant: str | None = None, *, cache: str | Path | None = None, seed: int = 0):
        """
        Args:
            tenant: a name of the engine's bank; None: the base model.
            cache: a folder of answers. They are kept by the adapter's content, so several adapters, and later versions
                of one, may share it (lm-eval's own cache does not know which adapter answered).
            seed: of sampled answers.
        """
        super().__init__(engine.tokenizer, engine.model.config.max_positions, seed, room=engine.max_length)
        self.engine, self.tenant = engine, tenant
        journal = AnswerJournal(expanded(cache) / "answers.jsonl" if cache else None)
        self.answerer = Answerer(
            engine.model,
            engine.bank,
            engine.tokenizer,
            rows=engine.slots,
            engine=engine,
            journal=journal,
            backbone=backbone_content(engine.model),
        )
        if tenant is not None and engine.bank is None:
            raise ValueError(f"tenant {shorten(tenant)}: the engine has no bank; give None, the base model")
        _ = self.content  # raises for an unknown tenant

    @property
    def content(self) -> str:
        """The hash of the adapter that the tenant has now."""
        bank = self.engine.bank
        return bank.entry(self.tenant).content if self.tenant is not None and bank is not None else "base"

    def answered(self, questions: list[Question]) -> Sequence[Answer]:
        return self.answerer.answer([(self.tenant, one) for one in questions])

    def set_cache_hook(self, cache_hook) -> None:
        if getattr(cache_hook, "dbdict", None) is not None:
            raise ValueError("use_cache does not know which adapter answered; give the model cache=FOLDER instead")
        super().set_cache_hook(cache_hook)

    # --------------------------------------------------------------------------------------- from lm-eval's arguments

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> ParaLM:
        """A ParaLM from lm-eval's --model_args, which are those of `from_source`."""
        return cls.from_source(**(additional_config or {}) | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> ParaLM:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def from_source(cls, backbone: str | None = None, adapter: str | None = None, **options) -> ParaLM:
        """A ParaLM with its own engine.

        Args:
            backbone, adapter: as for `para-jax generate`; backbone None is what the adapter names, and adapter None is
                the base model. The names that `hf` uses, pretrained and peft, work too.
            options: dtype, quantize, attention, batch_size (rows, default 8), max_length (tokens per row for answers to
                write, default 2048), cache, seed, allow_cpu, and variables of the chat template as `hf` has them:
                chat_template_args, and enable_thinking for that one.
        """
        known = "dtype quantize attention batch_size max_batch_size device max_length cache seed allow_cpu".split()
        known += ["chat_template_args", "enable_thinking"]
        backbone, adapter = options.pop("pretrained", backbone), options.pop("peft", adapter)
        given = {name: value for name, value in options.items() if value is not None}
        other = [name for name in given if name not in known]
        if other:
            names = ", ".join(["backbone", "adapter", *known])
            raise ValueError(f"model_args: {', '.join(other)} is unknown; known are {names}")
        given |= {"batch_size": 8} if str(given.get("batch_size")).startswith("auto") else {}
        numbers = {"batch_size": 8, "max_length": 2048, "seed": 0}
        rows, longest, seed = (int(given.get(name, default)) for name, default in numbers.items())
        devices.start(RuntimeSection(allow_cpu=bool(given.get("allow_cpu", False))))
        backbone = str(backbone or (adapter and backbone_of(str(adapter))) or BUILT_IN)
        cache = str(given.get("cache") or "")
        variables = template_variables("model_args: chat_template_args", given.get("chat_template_args"))
        if "enable_thinking" in given:
            variables = variables | {"enable_thinking": given["enable_thinking"]}
        tokenizer = load_tokenizer(backbone, variables)
        attention = str(given.get("attention", "auto"))
        model = load_backbone(backbone, dtype=given.get("dtype"), quantize=given.get("quantize"), attention=attention)
        bank, tenant = None, None
        if adapter is not None:
            tenant = str(adapter)
            held = {tenant: load_adapter(tenant, model.config, model=model)}
            bank = AdapterBank.holding(held, model.config)
        longest = min(longest, model.config.max_positions)
        engine = Engine(model, bank, tokenizer, slots=rows, max_length=longest)
        return cls(engine, tenant, cache=cache, seed=seed)

    def get_model_info(self) -> dict:
        """What lm-eval's record says about the model."""
        return {
            "model_dtype": str(self.engine.model.dtype),
            "model_sha": self.answerer.backbone[:16],
            "adapter": self.content,
        }

"""ParaLM: one tenant of an engine as a model of lm-eval, and lm-eval's own command line with it. Needs lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.registry import register_model

from ... import devices
from ...adapters.bank import AdapterBank
from ...adapters.files import load_adapter
from ...backbone.load import load_backbone
from ...config import RuntimeSection, expanded, require, shorten
from ...data.tokenizer import load_tokenizer
from ...serving.engine import Engine
from ..answers import Pass
from ..journal import Journal
from ..questions import Answer, Asked, backbone_content
from .requests import TokenLM


@register_model("para")
class ParaLM(TokenLM):
    """One tenant of an engine, whose slots and room it uses. Vectors are made of a request's context alone."""

    def __init__(self, engine: Engine, tenant: str | None = None, *, cache: str | Path | None = None, seed: int = 0):
        """
        Args:
            tenant: a name of the engine's bank; None: the base model.
            cache: a folder of answers. They are kept by the adapter's content, so that several adapters, and later
                versions of one, may share it (lm-eval's own cache does not know who answered).
            seed: of sampled answers.
        """
        super().__init__(engine.tokenizer, engine.model.config.max_positions, seed, room=engine.max_length)
        self.engine, self.tenant = engine, tenant
        journal = Journal(expanded(cache) / "answers.jsonl" if cache else None)
        content = backbone_content(engine.model)
        self.answers = Pass(engine.model, engine.bank, engine.tokenizer, content, journal)
        require(tenant is None or engine.bank is not None, "tenant", tenant, "None, for the engine has no bank")
        _ = self.content  # raises for an unknown tenant
        self._theirs: str | None = None  # who answers in lm-eval's own cache

    @property
    def content(self) -> str:
        """The hash of the adapter that the tenant has now."""
        bank = self.engine.bank
        return bank.entry(self.tenant).content if self.tenant is not None and bank is not None else "base"

    def answered(self, asked: list[Asked]) -> Sequence[Answer]:
        questions = [(self.tenant, one) for one in asked]
        found = self.answers.answer(questions, rows=self.engine.slots, engine=self.engine)
        entry = self.answers.entries.get(self.tenant)
        if self._theirs not in (None, entry.content if entry else "base"):
            raise ValueError(
                f"use_cache: tenant {shorten(self.tenant)} has another adapter now, and lm-eval would keep its answers "
                "as those of the one before. Give the model cache=FOLDER"
            )
        return found

    def set_cache_hook(self, cache_hook) -> None:
        """Takes lm-eval's own cache (use_cache) only if all its answers are this adapter's."""
        held = getattr(cache_hook, "dbdict", None)
        if held is not None:
            mark, ours = "para_jax: who answered", f"{self.answers.backbone} {self.content}"
            whose = held.get(mark)
            if whose != ours and len(held):
                raise ValueError(
                    "use_cache: this file holds answers of another adapter or model, and lm-eval would take them for "
                    "this one's; choose another file, or give the model cache=FOLDER"
                )
            held[mark] = ours
            self._theirs = self.content
        super().set_cache_hook(cache_hook)

    # ------------------------------------------------------------------------------------------- of lm-eval's arguments

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> ParaLM:
        """ParaLM of lm-eval's --model_args: those of `from_source`."""
        return cls.from_source(**(additional_config or {}) | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> ParaLM:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def from_source(cls, backbone: str = "smollm2-135m", adapter: str | None = None, **options) -> ParaLM:
        """A ParaLM with an engine of its own.

        Args:
            backbone, adapter: as para-jax generate takes them, adapter None is the base model; `hf`'s names, pretrained
                and peft, are taken too.
            options: dtype, quantize, attention, batch_size (rows, default 8), max_length (tokens a row where something
                is written, default 2048), cache, seed, allow_cpu.
        """
        known = "dtype quantize attention batch_size max_batch_size device max_length cache seed allow_cpu".split()
        backbone, adapter = options.pop("pretrained", backbone), options.pop("peft", adapter)
        given = {name: value for name, value in options.items() if value is not None}
        other = [name for name in given if name not in known]
        require(not other, "model_args", other, "backbone, adapter, " + ", ".join(known))
        given |= {"batch_size": 8} if str(given.get("batch_size")).startswith("auto") else {}
        rows, longest, seed = (
            whole(name, given.get(name, default))
            for name, default in (("batch_size", 8), ("max_length", 2048), ("seed", 0))
        )
        devices.start(RuntimeSection(allow_cpu=bool(given.get("allow_cpu", False))))
        backbone, cache = str(backbone), str(given.get("cache") or "")
        attention = str(given.get("attention", "auto"))
        model = load_backbone(backbone, dtype=given.get("dtype"), quantize=given.get("quantize"), attention=attention)
        bank, tenant = None, None
        if adapter is not None:
            tenant = str(adapter)
            held = {tenant: load_adapter(tenant, model.config, model=model)}
            bank = AdapterBank.holding(held, model.config)
        longest = min(longest, model.config.max_positions)
        engine = Engine(model, bank, load_tokenizer(backbone), slots=rows, max_length=longest)
        return cls(engine, tenant, cache=cache, seed=seed)

    def get_model_info(self) -> dict:
        """What lm-eval's record says of the model."""
        return {
            "model_dtype": str(self.engine.model.dtype),
            "model_sha": self.answers.backbone[:16],
            "adapter": self.content,
        }


def whole(name: str, value: object) -> int:
    """A number of --model_args; ValueError, naming it, for another text."""
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"model_args: {name}: {value!r} is not possible; expected a whole number") from None


def harness_command(arguments: list[str]) -> None:
    """lm-eval's own command line, in which the model `para` is known and is the default; `--use_cache` becomes ParaLM's
    cache, which knows the adapter."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *with_para(arguments)]
    cli_evaluate()


def with_para(arguments: list[str]) -> list[str]:
    """The arguments of `lm-eval run` with the model `para`, unless they name another or a config file that may."""
    if arguments[:1] in (["ls"], ["validate"], []) or {"-h", "--help"} & set(arguments):
        return arguments
    if value_of(arguments, "--config", "-C") or value_of(arguments, "--model", "-M") not in (None, "para"):
        return arguments
    folder = value_of(arguments, "--use_cache", "-c")
    made = without(without(arguments, "--use_cache", "-c"), "--model", "-M") + ["--model", "para"]
    made += [] if value_of(made, "--batch_size", "-b") else ["--batch_size", "8"]
    return made + ([] if folder is None else ["--model_args", f"cache={folder}"])


def value_of(arguments: list[str], *names: str) -> str | None:
    """The value of an option, given as `--name value` or `--name=value`."""
    for i, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def without(arguments: list[str], *names: str) -> list[str]:
    """The arguments without an option and its value."""
    made, skip = [], False
    for text in arguments:
        name, equals, _ = text.partition("=")
        if skip or name in names:
            skip = name in names and not equals
            continue
        made.append(text)
    return made

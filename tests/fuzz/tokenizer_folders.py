"""Tokenizer folders, and chat templates that others wrote."""

import json
import os
import random
from functools import cache
from pathlib import Path

from tiny_tokenizers import CHATML, INST, TURNS, own_space, plain, with_bos
from tokenizers import Tokenizer

from para_jax.data.examples import encode_example, encode_prompt, stop_token_ids
from para_jax.data.tokenizer import load_tokenizer

from . import mutate
from .cases import Trial, Wrong, shared_folder

TEXT = "where is my parcel? 123 é"
MESSAGES = [{"role": "user", "content": "hello"}]
FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "chat_template.jinja")
#: Keys of tokenizer_config.json that transformers acts on.
KEYS = (
    "model_max_length", "tokenizer_class", "auto_map", "added_tokens_decoder", "extra_special_tokens", "add_bos_token",
    "add_eos_token", "chat_template", "additional_special_tokens", "padding_side", "truncation_side", "bos_token",
    "eos_token", "pad_token", "clean_up_tokenization_spaces", "split_special_tokens", "backend",
)  # fmt: skip


@cache
def good(kind: int) -> Path:
    folder = shared_folder() / f"tokenizer-{kind}"
    (plain, with_bos, own_space)[kind]().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def tokenizer(draw: random.Random, folder: Path) -> Trial:
    """A changed tokenizer is refused by its folder's name, or encodes as the `tokenizers` library does."""
    made = mutate.copied(good(draw.randrange(3)), folder / "backbone")
    file = made / draw.choice(FILES)
    if draw.random() < 0.05:
        mutate.file(draw, file)
    elif file.suffix == ".json":
        file.write_bytes(changed_json(draw, file))
        if draw.random() < 0.1:
            (made / "evil.py").write_text("import os\nos.environ['EVIL'] = 'run'\n")
    else:
        file.write_bytes(mutate.data(draw, file.read_bytes()))

    def run():
        found = load_tokenizer(made)
        ids = encode_prompt(found, TEXT)
        found.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stops = stop_token_ids(found)
        encode_example(found, TEXT, "yes")
        if draw.random() < 0.5 and found.chat_template:
            encode_prompt(found, MESSAGES)
        return ids, stops

    def check(result):
        if "EVIL" in os.environ:
            raise Wrong("code of the folder was run")
        ids, stops = result
        if not all(type(id) is int and id >= 0 for id in (*ids, *stops)):
            raise Wrong(f"ids that are none: {ids} {stops}")
        if file.name != "tokenizer.json" and not file.name.endswith("config.json"):
            expected = Tokenizer.from_file(str(made / "tokenizer.json")).encode(TEXT).ids
            if ids != expected:
                raise Wrong(f"the ids are {ids}; the tokenizers library gives {expected}")

    return Trial(run, (str(made), "tokenizer", "chat template", "eos_token", "prompt"), check)


def changed_json(draw: random.Random, file: Path) -> bytes:
    found = json.loads(file.read_text())
    if file.name == "tokenizer.json" and draw.random() < 0.6:  # not in the vocabulary, which is most of it
        parts = [key for key in found if key not in ("model", "version")]
        found |= {"model": mutate.tree(draw, found["model"], ("type", "unk_token"))} if draw.random() < 0.3 else {}
        changed = mutate.tree(draw, {key: found[key] for key in parts}, ("type", "special_tokens", "single", "pattern"))
        return json.dumps(found | changed if isinstance(changed, dict) else changed).encode()
    return mutate.json_text(draw, found, KEYS)


# ----------------------------------------------------------------------------------------------------------- templates

#: Pieces of hostile templates: errors of every kind, endless work, endless output, and reaching out of the sandbox.
PIECES = (
    "{{ 1/0 }}", "{{ 'a' + 1 }}", "{{ messages[0].tool_calls | length }}", "{{ messages[5].content }}", "{{ x.y.z }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% break %}", "{% for i in range(3) %}{% break %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "{{ 'a' * 3000000000 }}", "{{ '%9999999999d' % 1 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ range(999999999) | list }}", "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}", "{{ lipsum(n=100000) }}", "{{ raise_exception('no') }}",
    "{{ raise_exception('\x1b]0;owned\x07' * 5000) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ '{0.__class__}'.format(1) }}", "{{ strftime_now('%Y') }}", "{{ strftime_now(5) }}", "{{ messages | tojson }}",
    "{{ messages | map(attribute='x') | sort }}", "{{ [1, 'a'] | sort }}", "{{ dict(a=1) | first | int }}", "{{",
    "{% for %}", "{% if %}", "{{ 'a'.encode() }}", "{{ '\\ud83d' }}", "{{ none + 1 }}", "{{ none.x }}",
    "{{ [] | first.x }}", "{{ messages.append(messages) }}", "{{ messages[0].update({'content': 5}) }}",
    "{{ messages.clear() }}",
    "", "{{ (" + "(" * 300 + "1" + ")" * 300 + ") }}", "{{ self }}", "{{ self.x() }}", "{{ caller() }}",
    "{{ loop.index }}",
    "{% generation %}a{% endgeneration %}", "{{ config }}", "{{ environ }}", "{{ messages | pprint | wordwrap(1) }}",
    "{{ 'x' | center(999999999) }}", "{{ ('a' * 50000) | replace('', 'b' * 50000) }}", "{{ 'a' | indent(999999999) }}",
)  # fmt: skip


def template(draw: random.Random, folder: Path) -> Trial:
    """A template that others wrote decides over nothing but chats, ends soon, and is named where it fails."""
    kind = draw.randrange(3)
    made = mutate.copied(good(kind), folder / "backbone")
    text, piece = (CHATML, TURNS, INST)[kind], draw.choice(PIECES)
    at = draw.choice((0, len(text), text.index("{%", 5)))
    text = draw.choice(
        (piece, piece, text[:at] + piece + text[at:], mutate.data(draw, text.encode()).decode("latin-1"))
    )
    (made / "chat_template.jinja").write_bytes(text.encode(errors="surrogatepass"))

    def run():
        found = load_tokenizer(made)
        stops, ids = stop_token_ids(found), encode_prompt(found, TEXT)
        if ids != encode_prompt(load_tokenizer(good(kind)), TEXT) or found.eos_token_id not in stops:
            raise Wrong("the template changed what a text prompt is, or whether EOS ends an answer")
        return encode_prompt(found, [dict(message) for message in MESSAGES])

    return Trial(run, (str(made), "chat template", "prompt"))

"""A chat template is a program of strangers: what it writes is a text, or its error a ValueError that names it."""

import json
from datetime import date

import pytest
import tiny_tokenizers

from para_jax.data.chats import (
    TemplateError,
    checked_messages,
    fixed_date,
    render,
    render_template,
    with_variables,
    writes_date,
)
from para_jax.data.examples import encode_prompt, turn_stop_ids
from para_jax.data.tokenizer import set_variables

USER = {"role": "user", "content": "where is <my> parcel?"}
CHAT = [{"role": "system", "content": "é"}, USER, {"role": "assistant", "content": "no"}]
ECHO = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


# What templates of published models use besides plain text.
PUBLISHED = {
    "tojson": "{{ messages | tojson }} {{ {'a': '<', 'b': 'é'} | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) -%}\n  [{{ m['role'] | upper }}]\n{%- endmacro %}\n{{ turn(messages[0]) }}\n",
    "special tokens": "{{ bos_token }}{{ messages[-1].content | trim }}{{ eos_token }}",
    "slices": "{{ messages[1:] | map(attribute='role') | join('|') }}{{ messages[::-1][0].content.split('o')[0] }}",
    "flags": "{% if add_generation_prompt is defined and add_generation_prompt %}>{% endif %}{{ tools is none }}",
    "other keys": "{{ messages[1].name is defined }}",
}


@pytest.mark.parametrize("template", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("more", [{"add_generation_prompt": True}, {"add_generation_prompt": False}])
def test_a_chat_is_rendered_as_by_transformers(template, more):
    tokenizer = tiny_tokenizers.byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>", chat_template=template)
    chat = [{"role": "system", "content": "é", "name": None}, USER | {"name": "Ann"}, CHAT[-1]]
    # newer ones leave null keys out themselves
    filled = [{key: value for key, value in message.items() if value is not None} for message in chat]
    assert render(tokenizer, chat, **more) == tokenizer.apply_chat_template(filled, tokenize=False, **more)


def test_the_last_message_can_be_continued_as_by_transformers():
    tokenizer, more = tiny_tokenizers.plain(), {"add_generation_prompt": False, "continue_final_message": True}
    assert render(tokenizer, CHAT, **more) == tokenizer.apply_chat_template(CHAT, tokenize=False, **more)


VALUES = {"flag": False, "count": -3, "part": 0.5, "style": "é 'x' \"y\" \\ \n %} }} \U0001f600", "nothing": None}
READS = [
    "{% if flag is defined and flag is false %}no{% endif %}{{ count + 1 }}{{ part }}{{ style }}{{ nothing is none }}",
    "\n  {%- for m in messages %}{{ m.content }}{% if not flag %}[{{ style }}]{% endif %}{% endfor %}",
    "\n{% macro turn(m) %}{{ m.content ~ style }}{% endmacro %}{{ turn(messages[0]) }}",
    "{% set flag = not flag %}{{ flag }}{{ 'yes' if flag else 'no' }}",
    "{% if flag is not defined %}{% set flag = true %}{% endif %}{{ flag }}{{ count }}",
]


@pytest.mark.parametrize("template", READS)
def test_variables_are_those_that_transformers_would_give(template):
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>", chat_template=template)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **VALUES)
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT, variables=VALUES)) == expected
    set_variables(tokenizer, {name: value for name, value in VALUES.items() if name in template})
    assert render(tokenizer, CHAT, add_generation_prompt=True) == expected
    changed = {"flag": True, "style": "new"}
    tokenizer.chat_template = with_variables(template, VALUES)
    again = render_template(tokenizer.chat_template, CHAT, add_generation_prompt=True, **changed)
    assert again == render_template(template, CHAT, add_generation_prompt=True, **VALUES | changed)


@pytest.mark.parametrize("name", ["tokenizer", "template", "self", "eos_token", "loop", "if", "true"])
def test_a_variable_of_any_name_ends_in_a_text_or_a_template_error(name):
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>", chat_template=ECHO + "{# " + name + " #}")
    set_variables(tokenizer, {name: 1})
    for variables in ({}, {name: 1}):
        try:
            assert encode_prompt(tokenizer, [USER], variables=variables)
        except TemplateError as error:
            assert name in ("if", "true", "self"), error


LLAMA = (  # how Llama 3.2's template finds the date
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- endif %}\n{%- endif %}\n"
    '{% macro head() %}[{{ strftime_now("%A, %-d.%m.%y %%") }}]{% endmacro %}{{ date_string }}{{ head() }}'
    "{%if true%}{{ strftime_now('%' + 'Y')|int + 1 }}{%-if true%}!{%endif%}{%endif%}"
)


def test_a_template_of_a_fixed_date_writes_it_as_the_current_one():
    tokenizer = tiny_tokenizers.byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>", chat_template=LLAMA)
    today, expected = date.today(), render(tokenizer, CHAT)
    assert writes_date(tokenizer) and not writes_date(tiny_tokenizers.plain())
    with fixed_date(tokenizer, today.isoformat()):
        fixed = render(tokenizer, CHAT)
    with fixed_date(tokenizer, "2024-02-09"):
        other = render(tokenizer, CHAT)
    assert other == "<s>09 Feb 2024[Friday, 9.02.24 %]2025!"
    assert fixed == expected or date.today() != today
    assert tokenizer.chat_template == LLAMA


HOSTILE = {
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a sum of text and number": ("{{ 'a' + 1 }}", "TypeError"),
    "a key that is a number": ("{% for call in messages[0].tool_calls %}{% endfor %}", "TypeError"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a break outside": ("{% break %}", "SyntaxError"),
    "no template": ("{% for %}", "Expected an expression"),
    "a deep template": (
        "{{ " + "(" * 9999 + ")" * 9999 + " }}",
        "RecursionError|nested|SyntaxError",
    ),
    "its own refusal": ("{{ raise_exception('no system role') }}", "no system role"),
    "its own refusal with an escape": ("{{ raise_exception('\x1b]0;owned') }}", r"\\x1b\]0;owned"),
    "an attribute of Python": ("{{ messages.__class__.__mro__ }}", "unsafe|is undefined|has no attribute"),
}


@pytest.mark.parametrize(("template", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_an_error(template, said):
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat template.*({said})") as raised:
        encode_prompt(tokenizer, [USER | {"tool_calls": 5}])
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()
    assert render_template(ECHO, [USER]) == "user" + USER["content"]


def test_a_message_that_nests_too_deep_is_an_error():
    value = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="nests deeper"):
        encode_prompt(tiny_tokenizers.plain(), [USER | {"tool_calls": value}])


def test_the_end_of_turn_follows_the_template():
    tokenizer = tiny_tokenizers.byte_level(["<a>", "<b>", "</s>"], eos_token="</s>")
    for end in ("<a>", "<b>"):
        tokenizer.chat_template = ECHO.replace("m.content", f"m.content + '{end}'")
        assert turn_stop_ids(tokenizer, [USER]) == (tokenizer.convert_tokens_to_ids(end),)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    assert turn_stop_ids(tokenizer, [USER]) == ()


def test_of_several_templates_the_default_one_is_used_and_its_lack_says_what_to_do():
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>", chat_template={"rag": "[R]", "default": ECHO})
    assert render(tokenizer, CHAT) == render_template(ECHO, CHAT)
    tokenizer.chat_template = {"rag": "[R]", "tools": ECHO}
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        render(tokenizer, CHAT)


#: How templates write the arguments of a tool call, and what becomes of {"city": "Rome"}.
ARGUMENTS = {
    "{{ call.arguments | tojson }}": '{"city": "Rome"}',  # Qwen's
    "{% for k, v in call.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}": "city=Rome",
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}": '{"city": "Rome"}',
    "{{ '<' + call.arguments + '>' }}": '<{"city":  "Rome"}>',  # R1-Distill's
}


@pytest.mark.parametrize("written", ARGUMENTS)
def test_arguments_that_are_json_text_suit_every_template(written):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":  "Rome"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    template = "{% set call = messages[0].tool_calls[0].function %}" + written
    assert render_template(template, [message]) == ARGUMENTS[written]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, "not JSON", "[1]", "[]", "[" * 100_000, 5])
def test_other_arguments_stay_as_they_are(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert render_template("{{ messages | tojson }}", [message]) == json.dumps([message])
    assert render_template("{{ messages[0].tool_calls[0] }}", [message | {"tool_calls": ["other"]}]) == "other"


def test_no_calls_are_as_no_field():
    """Responses of servers have "tool_calls": [], and templates may ask whether the field is there."""
    message = {"role": "assistant", "content": "Hello"}
    for empty in ([], None, {}):
        assert checked_messages("messages", [message | {"tool_calls": empty, "function_call": empty}]) == [message]

"""A function's options become the command line that means the same."""

import pytest

from para_jax.ray.command import arguments, parsed


def test_options_reach_the_command_as_they_were_given():
    stops = ["-", "two words", "\n", "a=b"]
    given = {"stop": stops, "temperature": 0.5, "tenant": "t", "adapters": ["a", "b=c d"], "allow_cpu": True}
    options = parsed(arguments("generate", given | {"no_compilation_cache": False, "seed": None}))
    assert (options.stop, options.temperature, options.tenant) == (stops, 0.5, ["t"])
    assert (options.adapters, options.allow_cpu, options.no_compilation_cache) == (["a", "b=c d"], True, False)
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    assert parsed(arguments("serve", given)).chat_template_kwargs == '{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("generate", {"output": "x"}, "generate_on_ray has no option output"),
        ("serve", {"slot": 3}, "serve_app has no option slot; did you mean slots?"),
        ("generate", {"top_k": "some"}, "argument --top-k: the value must be a whole number; got 'some'"),
    ],
)
def test_a_wrong_option_is_one_line(command, given, said, capsys):
    with pytest.raises(ValueError) as error:
        parsed(arguments(command, given))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""

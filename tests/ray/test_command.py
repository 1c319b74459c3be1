"""A function's options become the command line that means the same."""

import pytest

from para_jax.ray.command import arguments, parsed


def test_options_reach_the_command_as_they_were_given():
    given = {"adapters": ["a", "b=c d"], "limit": 3, "own": True, "log_samples": False, "seed": None, "tasks": "-x"}
    line = arguments("evaluate", ["run.yaml"], ["eval.batch_size=2"], given)
    assert line[:3] == ["evaluate", "run.yaml", "eval.batch_size=2"]
    options = parsed(arguments("evaluate", ["run.yaml"], ["eval.batch_size=2"], given | {"tasks": ["x:loss"]}))
    assert (options.config.name, options.overrides) == ("run.yaml", ["eval.batch_size=2"])
    assert (options.adapters, options.tasks, options.limit) == (["a", "b=c d"], ["x:loss"], 3)
    assert (options.own, options.log_samples, options.seed) == (True, False, None)
    stops = ["-", "two words", "\n", "a=b"]
    options = parsed(arguments("generate", [], [], {"stop": stops, "temperature": 0.5, "tenant": "t"}))
    assert (options.stop, options.temperature, options.tenant) == (stops, 0.5, ["t"])
    assert parsed(arguments("evaluate", [], [], {"chat": True})).chat  # of lm-eval's tasks; generate's is for --prompt
    assert parsed(arguments("generate", [], [], {"adapter": "runs/a/adapter"})).adapter == "runs/a/adapter"
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    assert parsed(arguments("serve", [], [], given)).chat_template_kwargs == '{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("evaluate", {"task": ["a"]}, "evaluate_on_ray has no option task; did you mean tasks?"),
        ("evaluate", {"zzz": 1}, "evaluate_on_ray has no option zzz; the options are "),
        ("evaluate", {"shard": "0/3"}, "no option shard"),
        ("evaluate", {"limit": [3, 4]}, "evaluate_on_ray: limit is [3, 4]; give one value"),
        ("generate", {"output": "x"}, "no option output"),
        ("generate", {"chat": True}, "no option chat"),
        ("serve", {"slot": 3}, "serve_app has no option slot; did you mean slots?"),
        ("serve", {"port": 1}, "no option port"),
        ("generate", {"top_k": "some"}, "argument --top-k: invalid int value: 'some'"),
        ("generate", {"dtype": "float8"}, "argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_a_wrong_option_is_one_line(command, given, said, capsys):
    with pytest.raises(ValueError) as error:
        parsed(arguments(command, [], [], given))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""

import pytest

from para_jax.config import config_dict, load_config, save_config, template_variables


def test_a_config_gives_them_as_a_mapping_or_as_json(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  chat_template_kwargs: {enable_thinking: false, budget: 3}\n")
    written = load_config(file)
    for text in ("{enable_thinking: false, budget: 3}", '{"enable_thinking": false, "budget": 3}'):
        assert load_config(None, [f"data.chat_template_kwargs={text}"]) == written
    assert load_config(None, ["data.chat_template_kwargs={budget: 3,  enable_thinking: no}"]) == written
    assert template_variables("", written.data.chat_template_kwargs) == {"enable_thinking": False, "budget": 3}
    save_config(written, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == written and hash(written.data) == hash(load_config(file).data)
    assert load_config(file, ["data.chat_template_kwargs=null"]).data.chat_template_kwargs is None
    none = load_config(file, ["data.chat_template_kwargs={}"])
    assert none == load_config(file, ["data.chat_template_kwargs=null"]) != written
    assert config_dict(load_config())["data"]["chat_template_kwargs"] is None


def test_scalars_of_any_kind_are_taken():
    given = {"enable_thinking": False, "budget": 3, "style": 'é "x"', "tone": None, "heat": 0.5}
    assert template_variables("given", given) == given
    assert template_variables("given", None) == template_variables("given", "{}") == {}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("enable_thinking", "'enable_thinking'"),
        ("{" * 9000, "{{{"),
        ({"messages": 1}, "'messages'"),
        ({"a b": 1}, "'a b'"),
        ({"a": [1]}, r"'a' can't be \[1\]"),
    ],
)
def test_anything_else_is_refused_by_name(given, named):
    with pytest.raises(ValueError, match=f"data.chat_template_kwargs.*{named}"):
        template_variables("data.chat_template_kwargs", given)


def test_a_config_refuses_them_by_its_fields_name():
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs.*enable_thinking' can't be \[1\]"):
        load_config(None, ["data.chat_template_kwargs={enable_thinking: [1]}"])

import json
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from para_jax.config import DataSection
from para_jax.data.given import SPLITS
from para_jax.data.records import Record, load_records, read_records
from para_jax.data.sources import open_split
from para_jax.server.protocol import ChatBody, validated

USER, BOT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


def write(folder, *rows, name="data.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


# ------------------------------------------------------------------------------------------------------------- records


def test_prompt_and_completion_are_read_as_text_or_messages(tmp_path):
    file = write(
        tmp_path,
        {"prompt": "Q:", "completion": "yes", "references": ["yes", "yep"], "label": 1},
        "",
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": [USER], "completion": "hi", "label": None},
    )
    assert read_records(file) == [
        Record("Q:", "yes", ("yes", "yep"), "1", f"{file}:1"),
        Record([USER], "hi", ("hi",), None, f"{file}:3"),
        Record([USER], "hi", ("hi",), None, f"{file}:4"),
    ]


def test_k_assistant_turns_are_k_records(tmp_path):
    file = write(tmp_path, {"messages": [USER, BOT, USER, BOT | {"content": "bye"}]})
    assert [(r.prompt, r.completion, r.place) for r in read_records(file)] == [
        ([USER], "hi", f"{file}:1"),
        ([USER, BOT, USER], "bye", f"{file}:1"),
    ]


def test_references_and_label_of_a_conversation_are_those_of_its_last_answer(tmp_path):
    row = {"messages": [USER, BOT, USER, BOT | {"content": "bye"}], "references": ["bye", "see you"], "label": 2}
    file = write(tmp_path, row, {"messages": [USER, BOT], "label": None})
    assert [(r.completion, r.references, r.label) for r in read_records(file)] == [
        ("hi", ("hi",), None),
        ("bye", ("bye", "see you"), "2"),
        ("hi", ("hi",), None),
    ]


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "reasoning", "thinking"])
def test_an_answer_with_more_than_content_is_refused_because_that_would_not_be_learnt(tmp_path, key):
    more = BOT | {key: [{"function": {"name": "f"}}]}
    for row in (
        {"messages": [USER, more]},
        {"messages": [USER, more, USER, BOT]},
        {"prompt": [USER], "completion": [more]},
    ):
        with pytest.raises(ValueError, match=f"data.jsonl:1: an assistant turn has {key}, and only its content"):
            read_records(write(tmp_path, row))
    empty = {"messages": [USER, BOT | {key: None}, USER | {key: "kept"}, BOT | {key: []}]}  # as Parquet fills rows up
    assert [record.completion for record in read_records(write(tmp_path, empty))] == ["hi", "hi"]


def test_a_turn_of_weight_0_is_read_and_not_learnt(tmp_path):
    """OpenAI's format for fine-tuning has it."""
    skipped, call = BOT | {"weight": 0}, BOT | {"weight": 0, "tool_calls": [{}]}
    row = {"messages": [USER, skipped, USER, BOT | {"weight": 1}, USER, call], "references": ["of the last"]}
    others = ({"messages": [USER, BOT | {"weight": None}]}, {"messages": [USER, skipped, USER, BOT], "label": "x"})
    made = read_records(write(tmp_path, row, *others))
    assert [(r.prompt, r.references, r.label) for r in made] == [
        ([USER, skipped, USER], ("hi",), None),
        ([USER], ("hi",), None),
        ([USER, skipped, USER], ("hi",), "x"),
    ]
    assert len(read_records(write(tmp_path, {"messages": [skipped, USER, BOT]}))) == 1  # a greeting that is not learnt
    assert len(read_records(write(tmp_path, {"messages": [BOT, USER, BOT]}))) == 1  # nor is an answer to nothing
    with pytest.raises(ValueError, match="data.jsonl:1: .*weight 0"):
        read_records(write(tmp_path, {"messages": [USER, skipped]}))


def test_parts_of_a_content_that_are_texts_are_one_text(tmp_path):
    """As the server reads them."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": None}]
    (record,) = read_records(write(tmp_path, {"messages": [USER | {"content": parts}, BOT | {"content": parts[:1]}]}))
    assert (record.prompt, record.completion) == ([USER | {"content": "a\nb"}], "a")
    chat = validated(ChatBody, {"model": "A", "messages": [USER | {"content": parts}]})
    assert chat.prompts == [record.prompt]
    for wrong in ([], ["a"], [{"type": "image_url", "text": "a"}], [parts[0] | {"x": 1}]):
        with pytest.raises(ValueError, match="is not a message"):
            read_records(write(tmp_path, {"messages": [USER | {"content": wrong}, BOT]}))


@pytest.mark.parametrize("calls", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}])
@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_a_turn_that_is_not_learnt_may_call_tools_without_a_content(tmp_path, content, calls):
    """As OpenAI writes it."""
    call, result = {"role": "assistant", **content, **calls}, {"role": "tool", "content": "in stock"}
    read = [USER, call | {"content": ""}, result]
    rows = {"messages": [USER, call | {"weight": 0}, result, BOT]}, {"prompt": [USER, call, result], "completion": "hi"}
    whole, given = read_records(write(tmp_path, *rows))
    assert (whole.prompt, given.prompt) == ([USER, read[1] | {"weight": 0}, result], read)
    assert whole.completion == given.completion == "hi"
    for row in ({"messages": [USER, call, result, BOT]}, {"prompt": [USER], "completion": [call]}):
        with pytest.raises(ValueError, match="data.jsonl:1: an assistant turn has .*, and only its content is learnt"):
            read_records(write(tmp_path, row))
    silent = BOT | {"content": "", "weight": 0}
    assert read_records(write(tmp_path, {"messages": [USER, silent, USER, BOT]}))[0].prompt == [USER, silent, USER]


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_tools_are_refused_because_no_prompt_would_have_them(tmp_path, name):
    for row in ({"messages": [USER, BOT]}, {"prompt": [USER], "completion": [BOT]}):
        assert len(read_records(write(tmp_path, row | {name: None}, row | {name: []}))) == 2  # as Parquet fills rows up
        assert len(read_records(write(tmp_path, row | {name: "[]"}, row | {name: "null"}))) == 2  # a column of JSON
        with pytest.raises(ValueError, match=f"data.jsonl:1: {name} "):
            read_records(write(tmp_path, row | {name: [{"type": "function"}]}))
    (made,) = read_records(write(tmp_path, {"q": "a", name: "b"}), prompt="{q}", completion=f"{{{name}}}")
    assert made.completion == "b"  # a template may use any column


def test_templates_read_any_columns(tmp_path):
    file = write(tmp_path, {"instruction": "add", "input": "{0.x} 1", "n": 2, "output": "3"})
    made = read_records(file, prompt="{{{instruction}}}\n{input} {n}", completion="{output}")
    assert (made[0].prompt, made[0].completion) == ("{add}\n{0.x} 1 2", "3")


def test_a_row_with_messages_needs_no_other_column(tmp_path):
    """Public chats often have a `prompt` too, the first message as text, but no `completion`."""
    more = [{}, {"prompt": "hello", "prompt_id": "x"}, {"completion": "hi"}]
    made = read_records(write(tmp_path, *({"messages": [USER, BOT]} | columns for columns in more)))
    assert [record[:2] for record in made] == [([USER], "hi")] * 3
    ready = {"messages": [USER, BOT], "prompt": "a", "completion": "b"}
    assert read_records(write(tmp_path, ready))[0][:2] == ("a", "b")


def test_a_task_reads_its_published_rows(tmp_path):
    file = write(tmp_path, {"sentence": "good", "label": 1, "prompt": "not this"})
    assert read_records(file, task="sst2")[0][:4] == (
        "good\nThe sentiment of the given sentence is:",
        "positive",
        ("positive",),
        "1",
    )
    assert read_records(file, task="sst2", prompt="{prompt}", completion="{sentence}")[0][:2] == ("not this", "good")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "completion": "b"', "not JSON"),
        ("[1]", "list; write an object"),
        ({"prompt": "a", "output": "b"}, "'completion'.*prompt, output"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "'prompt'.*conversations.*rename a field"),
        ({"prompt": " ", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": 1}, "completion must be text or a list of messages, not int"),
        ({"prompt": [], "completion": "b"}, "prompt is empty"),
        ({"prompt": ["a"], "completion": "b"}, "not a message"),
        ({"prompt": [USER], "completion": [BOT | {"weight": 0}]}, "one assistant message to learn"),
        ({"prompt": "a", "completion": [BOT]}, "one assistant message to learn after a prompt"),
        ({"prompt": "a", "completion": "b", "references": [""]}, r"references .*\[''\]"),
        ({"messages": [USER]}, "role assistant"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_file_and_line(tmp_path, row, message):
    file = write(tmp_path, {"prompt": "a", "completion": "b"}, "", row)
    with pytest.raises(ValueError, match=message) as error:
        read_records(file)
    assert str(error.value).startswith(f"{file}:3: ") and len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{missing}", r"data.jsonl:1: .*'missing'.*a, b"),
        ("{a.__class__}", r"data.jsonl:1: no field 'a.__class__'; the row has a, b"),
        ("{a", "data.jsonl:1: expected '}'"),
        ("a", "data.prompt is 'a', which every prompt would be; write {a} for the column"),
    ],
)
def test_a_template_can_only_name_columns(tmp_path, template, message):
    file = write(tmp_path, {"a": "x", "b": []})
    with pytest.raises(ValueError, match=message):
        read_records(file, prompt=template, completion="{a}")


def test_other_constant_templates_are_allowed(tmp_path):
    file = write(tmp_path, {"a": "x"})
    assert read_records(file, prompt="Write a line:", completion="{a}")[0][:2] == ("Write a line:", "x")
    assert read_records(file, prompt='{{"a": "{a}"}}', completion="{a}")[0].prompt == '{"a": "x"}'
    with pytest.raises(ValueError, match="which every completion would be"):
        read_records(file, prompt="{a}", completion="a")


def test_missing_or_empty_files_and_unknown_tasks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="data.jsonl has no rows"):
        read_records(write(tmp_path, "", " "))
    with pytest.raises(ValueError, match="data.task 'mnli'.*boolq, copa, squad, sst2"):
        read_records(write(tmp_path, "{}"), task="mnli")


# -------------------------------------------------------------------------------------------------------------- splits


def test_a_named_file_overrides_the_folder_of_data_train(tmp_path):
    for name in ("train", "validation", "other"):
        write(tmp_path, {"prompt": name, "completion": "b"}, name=f"{name}.jsonl")
    folder = DataSection(train=str(tmp_path))
    assert [bool(open_split(folder, split)) for split in SPLITS] == [True, True, False]
    assert load_records(folder, "train")[0].prompt == "train" and load_records(folder, "test") is None
    named = DataSection(train=str(tmp_path), validation=str(tmp_path / "other.jsonl"))
    assert load_records(named, "validation")[0].prompt == "other"
    alone = DataSection(train=str(tmp_path / "other.jsonl"))
    assert [bool(open_split(alone, split)) for split in SPLITS] == [True, False, False]


def test_training_data_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="data.train is not set"):
        load_records(DataSection(), "train")
    with pytest.raises(ValueError, match=r"data.train: .*train.jsonl does not exist"):
        load_records(DataSection(train=str(tmp_path)), "train")
    with pytest.raises(ValueError, match=r"data.test: .*gone.jsonl does not exist"):
        load_records(DataSection(test=str(tmp_path / "gone.jsonl")), "test")


def test_a_missing_file_is_named_with_what_stands_there(tmp_path):
    acme = tmp_path / "tenants" / "acme"
    acme.mkdir(parents=True)
    (acme / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for wrong, advice in {
        acme / "trian.jsonl": rf"did you mean {acme}/train.jsonl\?",
        tmp_path / "tenant": rf"did you mean {tmp_path}/tenants\?",
    }.items():
        with pytest.raises(ValueError, match=rf"data.train: {wrong}.* does not exist; .*{advice}"):
            load_records(DataSection(train=str(wrong)), "train")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_number_that_is_none_is_a_missing_value_and_no_text(tmp_path, ending):
    """Python writes a missing cell of a table as NaN."""
    file, rows = (
        tmp_path / f"x.{ending}",
        [{"a": "w3", "b": 1.0, "label": float("nan")}, {"a": "w4", "b": float("nan")}],
    )
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        columns = {name: [row.get(name) for row in rows] for name in ("a", "b", "label")}
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), file)
    else:
        file.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(file, prompt="{a}", completion="{a}")
    assert [one.label for one in records] == [None, None]
    with pytest.raises(ValueError, match=r"x\.\w+.[12].*: .*b"):
        read_records(file, prompt="{a} {b}", completion="{a}")


# ----------------------------------------------------------------------------------------------- columns of other types


def test_templates_take_decimals_and_dates(tmp_path):
    columns = {"price": [Decimal("12.50")], "day": [date(2026, 7, 25)]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet", prompt="{price}", completion="{day}")
    assert (record.prompt, record.completion) == ("12.50", "2026-07-25")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_field_that_is_there_twice_is_an_error(tmp_path, ending):
    """Readers differ in which of the two they take."""
    text = '{"prompt": "a", "completion": "yes", "completion": "no"}'
    (tmp_path / f"x.{ending}").write_text(f"[{text}]" if ending == "json" else text + "\n")
    with pytest.raises(ValueError, match="'completion' is there twice"):
        read_records(tmp_path / f"x.{ending}")

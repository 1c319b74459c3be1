"""JSON-lines data: rows with prompts, messages, templates and tasks, as records and as token ids."""

import json
import random
from pathlib import Path

from tiny_tokenizers import own_space, plain, with_bos

from para_jax.config import DataSection
from para_jax.data.encode_records import encode_records
from para_jax.data.records import read_records

from . import mutate
from .cases import Trial, Wrong

PLAIN = (
    {"prompt": "where is my parcel?", "completion": "shipping"},
    {"prompt": "the quick fox", "completion": " jumps", "references": ["jumps", "leaps"], "label": 3},
    {"prompt": [{"role": "user", "content": "hello"}], "completion": "yes"},
    {"prompt": [{"role": "user", "content": "a\nb"}], "completion": [{"role": "assistant", "content": "no"}]},
)
MESSAGES = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3},
)
TEMPLATES = (("Q: {question}\nA:", "{answer}"), ("{question}", "{answer} {{}}"))
COLUMNS = ({"question": "why", "answer": "so"}, {"question": 5, "answer": 1.5})
TASKS = {
    "sst2": {"sentence": "a joy .", "label": 1},
    "boolq": {"passage": "p", "question": "q", "answer": True},
    "copa": {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1},
    "sms_spam": {"sms": "win now", "label": 1},
    "banking77": {"text": "my card", "category": "lost_card"},
    "squad": {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    "gsm8k": {"question": "2+2", "answer": "4\n#### 4"},
    "wikisql": {"question": "q", "table": {"header": ["a"]}, "sql": {"human_readable": "SELECT a FROM table"}},
}


def rows(draw: random.Random, folder: Path) -> Trial:
    """The records of a file are those that its lines hold, or an error names the file and the line."""
    form = draw.choice(("plain", "plain", "messages", "template", "task"))
    options = {}
    if form == "template":
        options = dict(zip(("prompt", "completion"), draw.choice(TEMPLATES), strict=True))
    elif form == "task":
        options = {"task": draw.choice(list(TASKS))}
    kinds = {"plain": PLAIN, "messages": MESSAGES, "template": COLUMNS, "task": (TASKS.get(options.get("task")),)}
    good = [json.dumps(draw.choice(kinds[form])).encode() for _ in range(draw.randint(1, 4))]
    at = draw.randrange(len(good))
    good[at] = mutate.json_text(draw, json.loads(good[at]), ("prompt", "completion", "messages", "references", "role"))
    content = draw.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n \n")).join(good) + draw.choice((b"\n", b"", b"\0"))
    file = folder / "train.jsonl"
    file.write_bytes(mutate.data(draw, content) if draw.random() < 0.15 else content)
    if draw.random() < 0.03:
        mutate.file(draw, file, mutate.KINDS[:-1])  # data may be large: it is read as long as it goes on
    section = DataSection(max_seq_length=draw.choice((8, 64, 512)), truncate=draw.choice(("error", "skip", "left")))
    tokenizer = draw.choice((plain, with_bos, own_space))()

    def run():
        records = read_records(file, **options)
        return records, encode_records(records, tokenizer, section)

    def check(found):
        records, encoded = found
        require_same(file, form, records)
        if len(encoded.examples) + encoded.skipped != len(records):
            raise Wrong(f"{len(records)} records are {len(encoded.examples)} examples and {encoded.skipped} skipped")
        for example, record in zip(encoded.examples, encoded.records, strict=True):
            if len(example.prompt_ids) + len(example.completion_ids) > section.max_seq_length:
                raise Wrong(f"{record.place}: longer than max_seq_length")
            if isinstance(record.prompt, str) and not encoded.cut and tokenizer is not own_space():
                text = tokenizer.decode(example.prompt_ids, clean_up_tokenization_spaces=False)
                if record.prompt not in text:
                    raise Wrong(f"{record.place}: the prompt's ids stand for {text[:80]!r}")

    return Trial(run, (str(file), "max_seq_length", "chat template"), check)


def require_same(file: Path, form: str, records: list) -> None:
    lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]
    if form == "messages" and all("prompt" not in line for line in lines):
        turns = sum(turn["role"] == "assistant" for line in lines for turn in line.get("messages", []))
        if turns != len(records):
            raise Wrong(f"{turns} assistant turns are {len(records)} records")
    elif form == "plain" and len(lines) == len(records):
        for line, record in zip(lines, records, strict=True):
            if "prompt" in line and record.prompt != line["prompt"]:
                raise Wrong(
                    f"{record.place}: the prompt is {str(record.prompt)[:80]!r}, not {str(line['prompt'])[:80]!r}"
                )
            if isinstance(line.get("completion"), str) and record.completion != line["completion"]:
                raise Wrong(f"{record.place}: the completion is {record.completion[:80]!r}")
    elif form != "messages" and len(lines) != len(records) and all("messages" not in line for line in lines):
        raise Wrong(f"{len(lines)} lines are {len(records)} records")

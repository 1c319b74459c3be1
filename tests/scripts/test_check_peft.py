"""scripts/check_peft.py: which cases agree."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from check_peft import LIMIT, MOVED, agrees  # noqa: E402


@pytest.mark.parametrize("name, difference, moved, expected", [
    ("llama: lora", LIMIT, MOVED, True),
    ("llama: backbone", 0.0, 0.0, True),
    ("llama: lora", 2 * LIMIT, 1.0, False),
    ("llama: lora", 0.0, MOVED / 2, False),
    ("llama: lora", math.nan, 1.0, False),
    ("llama: lora", 0.0, math.nan, False),
])  # fmt: skip
def test_equal_logits_agree_where_the_adapter_moved_them(name, difference, moved, expected):
    assert agrees(name, difference, moved) == expected

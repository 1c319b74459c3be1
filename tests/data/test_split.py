"""Values of rows as plain Python."""

import numpy as np

from para_jax.data.rows import plain


def test_a_field_is_plain_python():
    field = {"text": [b"K\xc3\xb6ln", np.bytes_(b"b")], "start": np.array([1, 2], np.int32), "flag": np.bool_(True)}
    found = plain(field | {"n": np.int64(3), "words": np.array([b"x"], object), 7: ("a",), "bytes": b"\xff"})
    assert found == {"text": ["Köln", "b"], "start": [1, 2], "flag": True, "n": 3, "words": ["x"], "7": ["a"],
                     "bytes": b"\xff"}  # fmt: skip
    assert type(found["n"]) is int and type(found["flag"]) is bool and type(found["text"][1]) is str

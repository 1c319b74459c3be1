"""Values of NumPy's types, bytes and times as plain Python."""

from datetime import date, datetime, timedelta

import numpy as np

from para_jax.data.plain_values import plain_value


def test_a_field_is_plain_python():
    field = {"text": [b"K\xc3\xb6ln", np.bytes_(b"b")], "start": np.array([1, 2], np.int32), "flag": np.bool_(True)}
    found = plain_value(field | {"n": np.int64(3), "words": np.array([b"x"], object)})
    assert found == {"text": ["Köln", "b"], "start": [1, 2], "flag": True, "n": 3, "words": ["x"]}
    assert type(found["n"]) is int and type(found["flag"]) is bool and type(found["text"][1]) is str


def test_times_and_numbers_of_any_size_are_plain_python_too():
    time = np.datetime64("2020-01-02T03:04:05", "ns")
    found = plain_value({"t": time, "none": np.datetime64("NaT", "ns"), "long": np.array([1000], "m8[ns]")})
    assert found == {"t": datetime(2020, 1, 2, 3, 4, 5), "none": None, "long": [timedelta(microseconds=1)]}
    assert plain_value({"day": np.array(time.astype("M8[D]")), "ps": np.timedelta64(10**6, "ps")}) == {
        "day": date(2020, 1, 2),
        "ps": timedelta(microseconds=1),
    }
    assert plain_value(np.array(["2020-01", "2021-02"], "M8[M]")) == [date(2020, 1, 1), date(2021, 2, 1)]
    assert plain_value([np.datetime64("12000-01-01"), np.timedelta64(3, "M")]) == ["12000-01-01", "3 months"]
    assert plain_value(np.clongdouble(1)) == 1
    found = plain_value({"x": np.longdouble("0.1"), "xs": np.array([0.5], np.longdouble)})
    assert found == {"x": 0.1, "xs": [0.5]} and type(found["x"]) is float

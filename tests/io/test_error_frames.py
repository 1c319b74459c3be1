"""What an error keeps alive: in a notebook, which keeps the last error, that would be the backbone on the device."""

import weakref

import pytest

from para_jax.io.error_frames import errors_forget


class Large:
    pass


@errors_forget()
def fails(seen: list, error: BaseException) -> None:
    large = Large()
    seen.append(weakref.ref(large))
    try:
        fails_too(seen)
    except KeyError:
        raise error  # noqa: B904  # the first error is its context


def fails_too(seen: list) -> None:
    large = Large()
    seen.append(weakref.ref(large))
    raise KeyError("first")


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_and_the_one_before_it_keep_nothing(error):
    seen = []
    with pytest.raises(type(error)) as caught:
        fails(seen, error)
    assert caught.value is error and [one() for one in seen] == [None, None]
    assert [entry.name for entry in caught.traceback][-1] == "fails", "where it came from can still be read"

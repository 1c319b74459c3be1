"""A key opens everything or some tenants, and nothing but the right key opens anything."""

import hmac

import pytest

from para_jax.server import api_keys
from para_jax.server.api_keys import Access, ApiKeys, read_keys, require_unlimited, warn_of_missing
from para_jax.server.errors import ApiError

KEYS = ApiKeys(["sk-all", "sk-some acme globex", "sk-ümlaut"])


def test_a_key_opens_everything_or_its_tenants_and_the_base():
    assert KEYS.access("Bearer sk-all") == Access(None, keyed=True)
    some = KEYS.access("bearer  sk-some")
    assert [some.may_use(name) for name in ("acme", "globex", "initech", None)] == [True, True, False, True]
    assert KEYS.access("Bearer sk-all").may_use("initech")
    require_unlimited(KEYS.access("Bearer sk-all"))
    with pytest.raises(ApiError) as raised:
        require_unlimited(some)
    assert raised.value.status == 403


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "sk-all", "Basic sk-all", "Bearer sk-al", "Bearer sk-all2", "Bearer sk-some acme"],
)
def test_other_headers_open_nothing(header):
    with pytest.raises(ApiError) as raised:
        KEYS.access(header)
    error = raised.value
    assert error.status == 401 and error.code == "invalid_api_key" and error.headers["www-authenticate"] == "Bearer"
    assert "sk-" not in error.message


def test_without_keys_everything_is_open_and_no_one_has_shown_a_key():
    assert ApiKeys([]).access(None) == Access(None, keyed=False)


@pytest.mark.parametrize("given", ["sk-all", "sk-ümlaut", "wrong", "sk-al"])
def test_all_keys_are_compared_in_constant_time(monkeypatch, given):
    compared, real = [], hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    try:
        KEYS.access(f"Bearer {given}")
    except ApiError:
        pass
    assert compared == [(32, 32)] * 3


@pytest.mark.parametrize("start", [b"# ours\n\n", b"\xef\xbb\xbf"])  # the second is how Windows marks UTF-8
def test_a_file_has_a_key_on_each_line(tmp_path, start):
    file = tmp_path / "keys"
    file.write_bytes(start + b"sk-1\n  sk-2 acme  \r\n")
    file.chmod(0o600)
    keys = read_keys(file)
    assert keys.access("Bearer sk-1").tenants is None and keys.access("Bearer sk-2").tenants == {"acme"}


@pytest.mark.parametrize("content", [None, b"# none\n\n", b"\xff\xfe", b"a\na b\n"])
def test_a_wrong_or_missing_file_is_refused_by_name(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="--api-key-file .*keys"):
        read_keys(file)


def test_tenants_of_a_key_that_are_not_served_are_warned_of(capfd):
    keys = ApiKeys(["sk-all", "sk-1 acme base", "sk-2 amce globex"])
    warn_of_missing(keys, ("acme", "globex", "base"))
    assert "tenants that are not served: 'amce'; check" in capfd.readouterr().err
    warn_of_missing(keys, ("acme", "globex", "base", "amce"))
    warn_of_missing(ApiKeys(["sk-all"]), ())
    assert not capfd.readouterr().err


def test_a_file_that_everyone_can_read_is_warned_of(tmp_path, capfd):
    file = tmp_path / "keys"
    file.write_text("sk-1\n")
    file.chmod(0o600)
    read_keys(file)
    assert "chmod" not in capfd.readouterr().err
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in capfd.readouterr().err


def test_each_limited_key_has_a_salt_of_its_own():
    keys = ApiKeys(["all", "a acme", "b acme"])
    salts = [keys.access(f"Bearer {key}").salt for key in ("all", "a", "b")]
    assert salts[0] is None and None not in salts[1:] and len(set(salts)) == 3

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import unexpected_skips

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        ("", ["tests/a.py::one", "tests/b.py"]),
        ("# a comment\n\ntests/a.py # it needs a TPU\n", ["tests/b.py"]),
        ("tests/a.py::one # it needs a TPU\ntests/b.py # so does it", []),
        ("tests/a.py\ntests/b.py #\n", ["tests/a.py::one", "tests/b.py"]),
    ],
)
def test_a_skip_is_allowed_by_a_line_with_its_id_and_a_reason(allowed, left):
    assert unexpected_skips(["tests/a.py::one", "tests/b.py"], allowed) == left


@pytest.mark.parametrize(
    ("skip", "code"),
    [
        ("def test_one(): pass", 0),
        ("@pytest.mark.skip\ndef test_one(): pass", 1),
        ("pytest.importorskip('not_there')", 1),
        ("@pytest.mark.skip\ndef test_allowed(): pass", 0),
    ],
)
def test_a_session_with_a_skip_that_is_not_allowed_fails(tmp_path, skip, code):
    for name in ("conftest.py", "helpers/quick_compiler.py"):
        shutil.copy(TESTS / name, tmp_path)
    (tmp_path / "allowed_skips.txt").write_text("test_some.py::test_allowed # to see that it is allowed\n")
    (tmp_path / "test_some.py").write_text(f"import pytest\n{skip}\ndef test_two(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("not in tests/allowed_skips.txt: test_some.py" in done.stdout) == bool(code)

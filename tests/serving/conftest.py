"""The backbone of most engines here."""

import pytest
from golden_models import backbone


@pytest.fixture(scope="module")
def model():
    return backbone("llama")

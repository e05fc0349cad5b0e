"""What tests of samples and of perplexity begin with."""

import pytest


@pytest.fixture
def text(tmp_path):
    from tests.folders.tiny import TEXT  # it imports transformers

    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path

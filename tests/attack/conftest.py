"""The data of whole runs."""

import pytest

from tests.support.testing import run_distributed


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Data and teachers, see `tiny_run.Corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.support.tiny_run:make_corpus", 1, folder)[0]

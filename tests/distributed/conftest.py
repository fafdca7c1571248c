import pytest

from megatron_let.testing import run_distributed


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Data and teachers of whole runs, see `training.Corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.distributed.training:make_corpus", 1, folder)[0]

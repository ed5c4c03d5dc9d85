import pytest

from tests.models.oracle import Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    return Oracle(tmp_path_factory.mktemp("oracle"))

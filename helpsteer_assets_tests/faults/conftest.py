"""One undisturbed home, which all the trials of a test session are compared with."""

import pytest

from helpsteer_assets_tests.faults.campaign import Undisturbed


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The experiment of the campaign, run once. Its home is not to be changed."""
    return Undisturbed.make(tmp_path_factory.mktemp("undisturbed"))

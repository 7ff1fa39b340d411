"""The fixture with which the tests of the doctor make broken installations."""

import pytest

from tests.doctor.fake_environment import FakeEnvironment


@pytest.fixture
def fake(tmp_path) -> FakeEnvironment:
    """An environment in which nothing is wrong, until a test breaks something."""
    return FakeEnvironment(tmp_path)

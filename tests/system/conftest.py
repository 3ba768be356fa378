"""This machine made ready for tests that are root."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def machine_without_useless_kvm(no_useless_kvm: None) -> None:
    """What is chosen for a machine is the same wherever the tests run."""

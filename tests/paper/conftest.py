"""Every test of the comparison runs on one thread."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(single_thread: None) -> None:
    """The fixture of all tests, for each of these."""

"""What all tests of reports share."""

import pytest


@pytest.fixture(autouse=True)
def short_reports() -> None:
    """Reports have pictures."""

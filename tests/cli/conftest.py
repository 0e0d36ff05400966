"""What each test of the commands finds as it was."""

import os
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def environment_stays():
    """Commands that run in this process set variables for their builds."""
    with mock.patch.dict(os.environ):
        yield

import os

import pytest


# No test needs the network; nor do the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def planted():
    from planted import Planted

    return Planted()

import pytest
from small_selectors import VARIANTS


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param

import jax
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25)
settings.load_profile("default")


@pytest.fixture(scope="module")
def float64():
    with jax.enable_x64(True):
        yield

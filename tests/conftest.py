import gc
import os
from importlib import metadata
from pathlib import Path

# Most of the suite's time is compilation: made shorter, and shared by all processes.
# Later versions may not know the last flag.
os.environ |= {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    + (
        "--xla_cpu_use_fusion_emitters=false"
        if metadata.version("jaxlib").startswith("0.10.")
        else ""
    ),
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache/jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
} | dict(os.environ)

import jax
import pytest
from hypothesis import settings

# The suite gives the same verdict every time; HYPOTHESIS_PROFILE=explore looks further.
settings.register_profile("default", deadline=None, max_examples=6, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


gc.set_threshold(50_000, 20, 20)  # what is compiled lives on; look at it rarely
jax.config.update("jax_num_cpu_devices", 8)  # simulated, for tests of sharding


@pytest.fixture(scope="module")
def float64():
    with jax.enable_x64(True):
        yield

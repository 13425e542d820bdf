"""Every test runs on eight simulated CPU devices, whatever the machine has."""

import atexit
import os
import shutil
import tempfile

import hypothesis
import jax

# What a user's own settings would change: how wide and colourful tables are, the precision of
# numbers, and who trains with whom.
SETTINGS = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "JAX_ENABLE_X64")
for name in list(os.environ):
    if name.startswith("SLURM_") or name in SETTINGS:
        del os.environ[name]
jax.config.update("jax_enable_x64", False)

# One compilation cache for the session, its workers and the processes that tests start: half of the
# suite's time would go to compiling the same small networks again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="sync_jax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Most of the suite's time is compilation, and what is compiled runs for seconds at most. CI's own
# training and the processes that tests start have XLA's usual optimisations.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# Before anything starts a backend: afterwards neither can be changed.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No deadline: the first example of a test pays for its compilation, and the machine may be busy.
# Derandomised, so that the same code always gives the same result.
hypothesis.settings.register_profile(
    "sync_jax",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sync_jax")

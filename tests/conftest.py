"""Every test runs on eight simulated CPU devices, whatever the machine has."""

import hypothesis
import jax

# Before anything starts a backend: afterwards neither can be changed.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No deadline, for the first example of a test pays for its compilation. Derandomised, so that the
# same code always gives the same result.
hypothesis.settings.register_profile("sync_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sync_jax")

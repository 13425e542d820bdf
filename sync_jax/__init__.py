"""Selective classification in JAX/Flax, with the SYNC loss."""

__version__ = "0.1.0"

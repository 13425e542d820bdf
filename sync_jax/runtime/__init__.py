"""Checkpoints, devices, processes, signals, files, console and profiling."""

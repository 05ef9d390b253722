"""Loops that Numba compiles for CPUs, and products in oneDNN's order."""

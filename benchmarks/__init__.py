"""Measurements of safepool beside other pools; every figure is a ratio taken side by side in one run."""

"""Benchmarks: they measure and write results; tests check."""

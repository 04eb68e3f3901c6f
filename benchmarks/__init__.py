"""Benchmarks of the operators and of training."""

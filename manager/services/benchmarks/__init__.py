"""Benchmarks of models on instances."""

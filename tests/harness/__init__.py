"""Helpers of the test suite and the benchmarks: real torchrun jobs and what they logged."""

"""Helpers of the test suite and the benchmarks: real torchrun jobs and their logs."""

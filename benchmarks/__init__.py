"""Benchmarks: each prints tables with the machine that measured them."""

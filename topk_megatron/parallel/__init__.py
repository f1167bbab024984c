"""Sparse transport and saved activations, and TopK over tensor-parallel ranks."""

"""Megatron's torch_dist checkpoints: find, read and write them, without running their code."""

"""Megatron's torch_dist checkpoints: finding, reading and writing them, and the one way in."""

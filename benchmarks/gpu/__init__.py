"""The measurements of scripts/gpu_check.sh, each a program of its own; docs/gpu_check.md explains them."""

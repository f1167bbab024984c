"""The measurements of scripts/gpu_check.sh, each a program; docs/gpu_check.md explains them."""

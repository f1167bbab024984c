"""scripts/gpu_check.sh and its programs, as far as a machine without a GPU can test them."""

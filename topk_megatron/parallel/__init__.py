"""What parallelism gains from sparsity, and what sparsity needs from parallelism."""

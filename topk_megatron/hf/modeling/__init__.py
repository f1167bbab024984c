"""The model's own code: these files travel with every exported checkpoint.

They import torch, transformers and each other, so that a checkpoint opens where this package is not
installed; where it is, the fused operator is used, with equal results.
"""

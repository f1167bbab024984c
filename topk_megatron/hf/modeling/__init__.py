"""The model's own code: these files travel with every exported checkpoint.

They import torch, transformers and each other, so that a checkpoint opens where this package is not
installed. Where it is installed, they use its fused operator, with equal results.
"""

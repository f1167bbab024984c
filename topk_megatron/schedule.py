"""k as a function of the iteration.

Before ``anneal_begin`` k is the start k, from ``anneal_end`` on it is k, and between the two, with
p = (iteration - begin) / (end - begin):

    linear       k_start + p (k - k_start)
    cosine       k + (k_start - k) (1 + cos(pi p)) / 2
    exponential  k_start (k / k_start)^p        (linear in log k)

rounded to the nearest integer. A pure function, so that a resumed run continues where it was.
"""

import math

from topk_megatron.config import TopKConfig


def k_at(config: TopKConfig, iteration: int) -> int:
    """Neurons kept at each TopK layer in the step numbered `iteration`, counted from 0."""
    start = config.start_k
    if config.anneal == "constant" or iteration >= config.anneal_end:
        return config.k
    if iteration <= config.anneal_begin:
        return start
    progress = (iteration - config.anneal_begin) / (config.anneal_end - config.anneal_begin)
    if config.anneal == "linear":
        k = start + progress * (config.k - start)
    elif config.anneal == "cosine":
        k = config.k + (start - config.k) * (1 + math.cos(math.pi * progress)) / 2
    else:
        k = start * (config.k / start) ** progress
    return round(k)

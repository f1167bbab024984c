"""The parts that `pretrain_topk_gpt.py` adds to Megatron's training loop."""

"""What `pretrain_topk_gpt.py` adds to Megatron's training loop."""

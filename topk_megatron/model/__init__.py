"""TopK layers and the specs that put them into Megatron's GPT model."""

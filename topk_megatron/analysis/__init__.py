"""What the neurons of an exported model mean. Works on Hugging Face folders; needs no Megatron."""

"""How good an exported model is: perplexity on text, and the tasks of lm-evaluation-harness."""

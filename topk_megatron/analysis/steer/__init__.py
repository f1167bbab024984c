"""`steer`: what pushing a neuron does to the text that a model writes."""

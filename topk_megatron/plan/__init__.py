"""What a model will cost on a cluster: memory, traffic, time, and the best layout."""

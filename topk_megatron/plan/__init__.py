"""What a model costs on a cluster, before there is one: memory, traffic, time, the best layout."""

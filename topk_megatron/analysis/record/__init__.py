"""`record`: what the neurons of a model do on a corpus, kept as tables."""

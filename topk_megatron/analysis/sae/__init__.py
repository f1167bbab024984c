"""`sae`: post-hoc sparse autoencoders, the baseline."""

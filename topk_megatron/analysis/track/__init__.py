"""`track`: neurons over training and over layers."""

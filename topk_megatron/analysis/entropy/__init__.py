"""`entropy`: how specialised neurons are."""

"""Two web pages: the report of a study, and the explorer of a model."""

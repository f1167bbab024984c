"""The pages: a report of a study, and the explorer of a model."""

"""Code and assets that the report and the explorer share."""

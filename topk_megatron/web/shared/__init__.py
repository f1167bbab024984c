"""What the report and the explorer share: cards of neurons, and the scripts that draw them."""

"""From one machine to many: the launcher that tells a scheduler how a run ended."""

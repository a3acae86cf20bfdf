"""From layer to layer: ask the exit, let the decided rows go, carry on with the others."""

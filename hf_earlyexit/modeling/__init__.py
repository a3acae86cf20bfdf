"""Models with exits: thin doors on transformers' stock classes."""

"""Sharing models: one folder that tells all, and one commit that carries it."""

"""Running models on rows: many at once, each at its own depth; traces, int8, explanations."""

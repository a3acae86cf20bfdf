"""Running models: the exit loop, traces, throughput."""

"""The forms in which a classifier can answer: number formats, and engines; each with thresholds of its own."""

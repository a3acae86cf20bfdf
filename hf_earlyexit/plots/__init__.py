"""Figures as small SVG text, for cards and reports. Needs matplotlib, from the [report] extra."""

"""Pages for people: one HTML file that needs nothing else. Needs the [report] or the [caption] extra."""

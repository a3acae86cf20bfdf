"""Reports for people: one HTML file that needs nothing else. Needs the [report] extra."""

from .write import write_report

__all__ = ["write_report"]

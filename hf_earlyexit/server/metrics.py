"""What `/metrics` tells: counts and times, never a text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..serving.monitor import Monitor
from ..serving.online import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counts of one server.

    Args:
        engine: whose queue and batches are told.
        monitor: whose counts are told.
    """

    def __init__(self, engine: Engine, monitor: Monitor | None = None) -> None:
        self.registry = CollectorRegistry()
        name = "hf_earlyexit_{}".format
        self.requests = Counter(name("requests"), "Requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            name("request_seconds"), "From request to response.", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.exits = Counter(name("exits"), "Rows by the layer they left after.", ["layer"], registry=self.registry)
        for what, help_text in (
            ("queued", "Rows that wait to be let in."),
            ("running", "Rows under way."),
            ("answered", "Rows answered."),
            ("failed", "Rows with an error."),
            ("refused", "Rows sent away because the queue was full."),
            ("batches", "Batches run from one exit to the next."),
            ("batch_fill", "Mean share of a full batch."),
            ("restarts", "Times that the worker was started anew."),
        ):
            gauge = Gauge(name(f"engine_{what}"), help_text, registry=self.registry)
            gauge.set_function(lambda what=what: getattr(engine.state, what))  # type: ignore[misc]
        if monitor is not None:
            for what in ("num_rows", "num_shadowed", "num_different"):
                gauge = Gauge(name(f"monitor_{what.removeprefix('num_')}"), "Of the monitor.", registry=self.registry)
                gauge.set_function(lambda what=what: getattr(monitor.state, what))  # type: ignore[misc]
            alarms = Gauge(name("monitor_alarms"), "Alarms of the monitor.", registry=self.registry)
            alarms.set_function(lambda: len(monitor.state.alarms))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

"""What `/metrics` tells: counts and times, never a text; of several processes, those of all."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ..serving.monitor import Monitor
from ..serving.online import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
FOLDER_OF_ALL = "PROMETHEUS_MULTIPROC_DIR"  # of several processes; to be set before prometheus_client is imported
ENGINE_GAUGES = (  # what, in words, and how several processes' are told as one
    ("queued", "Rows that wait to be let in.", "livesum"),
    ("running", "Rows under way.", "livesum"),
    ("answered", "Rows answered.", "sum"),
    ("failed", "Rows with an error.", "sum"),
    ("refused", "Rows sent away because the queue was full.", "sum"),
    ("batches", "Batches run from one exit to the next.", "sum"),
    ("batch_tokens", "Tokens in all of them, padding included.", "sum"),
    ("batch_fill", "Mean share of a full batch.", "livemostrecent"),
    ("restarts", "Times that the worker was started anew.", "sum"),
)
MONITOR_GAUGES = (
    ("rows", "Rows that the monitor saw."),
    ("shadowed", "Of them, those that the full model answered as well."),
    ("different", "Of these, those whose early answer was another."),
    ("alarms", "Alarms so far."),
    ("lower", "Lower bound of the share of differing answers."),
    ("upper", "Upper bound of it."),
    ("limit", "The largest share that is fine."),
)


class Metrics:
    """Counts of one server.

    Args:
        engine: whose queue and batches are told.
        monitor: whose counts are told.
    """

    def __init__(self, engine: Engine, monitor: Monitor | None = None) -> None:
        self.engine, self.monitor = engine, monitor
        self.one_of_many = FOLDER_OF_ALL in os.environ
        self.registry = CollectorRegistry()
        name, registry = "hf_earlyexit_{}".format, self.registry
        self.requests = Counter(name("requests"), "Requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            name("request_seconds"), "From request to response.", ["path"], buckets=SECONDS, registry=registry
        )
        self.exits = Counter(name("exits"), "Rows by the layer they left after.", ["layer"], registry=registry)
        gauges = [(f"engine_{what}", words, mode) for what, words, mode in ENGINE_GAUGES]
        if monitor is not None:
            gauges += [(f"monitor_{what}", words, "mostrecent") for what, words in MONITOR_GAUGES]
        self.gauges = {
            what: Gauge(name(what), words, multiprocess_mode=mode, registry=registry)  # type: ignore[arg-type]
            for what, words, mode in gauges
        }

    def count(self, path: str, status: int, seconds: float) -> None:
        """A request that has been answered."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)
        if self.one_of_many:  # another process may be asked next
            self.refresh()

    def refresh(self) -> None:
        """Take over the engine's counts."""
        state = self.engine.state
        for what, *_ in ENGINE_GAUGES:
            self.gauges[f"engine_{what}"].set(getattr(state, what))

    def text(self) -> bytes:
        """All of it, of every process, as Prometheus reads it."""
        self.refresh()
        if self.monitor is not None:
            state, (lower, upper) = self.monitor.state, self.monitor.bounds()
            counts = (state.num_rows, state.num_shadowed, state.num_different, len(state.alarms))
            for (what, _), value in zip(MONITOR_GAUGES, (*counts, lower, upper, self.monitor.limit or 0), strict=True):
                self.gauges[f"monitor_{what}"].set(value)
        if not self.one_of_many:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

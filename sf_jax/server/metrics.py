"""The metrics that `/metrics` exports to Prometheus."""

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics of one server; p50, p95 and p99 are `histogram_quantile` of the histograms."""

    registry: CollectorRegistry
    first_chunk: Histogram
    interval: Histogram
    chunk_time: Histogram
    chunks: Counter
    in_time: Counter
    underruns: Counter
    dropped: Counter
    refused: Counter
    streams: Gauge
    queue: Gauge
    slots: Gauge

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def make_metrics() -> Metrics:
    """Creates metrics, all zero, in their own registry."""
    registry = CollectorRegistry()

    def one(kind, name, text, *labels, **options):
        return kind(f"sf_jax_{name}", text, labels, registry=registry, **options)

    return Metrics(
        registry=registry,
        first_chunk=one(Histogram, "first_chunk_seconds", "From the request to the first chunk", buckets=SECONDS),
        interval=one(Histogram, "chunk_interval_seconds", "Between two chunks of a stream", buckets=SECONDS),
        chunk_time=one(Histogram, "step_seconds", "A step of all streams", buckets=SECONDS),
        chunks=one(Counter, "chunks", "Chunks made"),
        in_time=one(Counter, "chunks_in_time", "Chunks made before the viewer had played all others"),
        underruns=one(Counter, "underruns", "Times that a viewer had played everything that was made"),
        dropped=one(Counter, "chunks_dropped", "Chunks dropped for slow viewers"),
        refused=one(Counter, "refused", "Requests that were refused", "code"),
        streams=one(Gauge, "streams", "Streams that have a slot"),
        queue=one(Gauge, "queue", "Clients that wait for a slot"),
        slots=one(Gauge, "slots", "Streams that there can be at once"),
    )

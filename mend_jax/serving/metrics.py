"""What the server counts, in the text form that Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE  # noqa: F401

from mend_jax.scoring.tasks import programs_compiled

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server."""

    def __init__(self, service):
        """Gauges are read from the `service` (service.py) when they are asked for."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and CPU time, on Linux
        self._requests = Counter(
            "mend_requests",
            "Requests, by what was asked and the status code; 499: the client hung up.",
            ("endpoint", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "mend_request_seconds",
            "From a request's head to the end of its answer.",
            ("endpoint",),
            buckets=SECONDS,
            registry=registry,
        )
        self._together = Histogram(
            "mend_batch_requests", "Requests that were answered in one call.", buckets=REQUESTS, registry=registry
        )
        for name, said, value in (
            ("waiting", "Requests that wait for the device.", lambda: service.worker.waiting),
            ("packs", "Packs that are kept.", lambda: len(service.packs)),
            ("pack_bytes", "Bytes of their vectors.", lambda: service.packs.bytes),
            ("packs_evicted", "Packs that made room for others.", lambda: service.packs.evicted),
            ("cache_bytes", "Bytes of keys and values that are kept.", lambda: service.engine.caches.bytes),
            ("caches_evicted", "Keys and values that made room for others.", lambda: service.engine.caches.evicted),
            (
                "programs_compiled",
                "Programs compiled, or read from the compile cache: who waits for one waits long.",
                programs_compiled,
            ),
        ):
            Gauge(f"mend_{name}", said, registry=registry).set_function(value)

    def count(self, scope: dict, status: int, seconds: float) -> None:
        """A request has ended."""
        name = getattr(scope.get("endpoint"), "__name__", "other")
        self._requests.labels(name, str(status)).inc()
        self._seconds.labels(name).observe(seconds)

    def batch(self, requests: int) -> None:
        """So many requests were answered in one call."""
        self._together.observe(requests)

    def text(self) -> bytes:
        return generate_latest(self._registry)

"""Numbers for Prometheus; each server has its own, so that several can live in one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PICTURES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """
    What the server counts. No label holds anything that a client chose, so that their number is bounded.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cogview2_requests", "Answers, by route and status.", ["route", "status"], registry=self.registry
        )
        self.jobs = Counter(
            "cogview2_jobs",
            "Work that has ended, by kind and outcome: done, refused, cancelled, expired or failed.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.pictures = Counter(
            "cogview2_pictures", "Pictures made, by kind of work.", ["kind"], registry=self.registry
        )
        self.places = Gauge(
            "cogview2_places_taken",
            "Requests that wait or are computed, of the queue's limit.",
            registry=self.registry,
        )
        self.busy = Gauge("cogview2_busy", "1 while the model computes.", registry=self.registry)
        self.batches = Histogram(
            "cogview2_batch_pictures",
            "Pictures computed together, by kind of work; counted at every stage.",
            ["kind"],
            buckets=PICTURES,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "cogview2_job_seconds",
            "Time from the start of work to its end.",
            ["kind"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.waited = Histogram(
            "cogview2_wait_seconds", "Time from arrival to the start of work.", buckets=SECONDS, registry=self.registry
        )

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

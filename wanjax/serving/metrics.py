"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wanjax.serving.jobs import Jobs

SECONDS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """Counters of one server.

    Args:
      jobs: whose states are counted when somebody asks; None: of a host that serves nobody.
    """

    def __init__(self, jobs: Jobs | None):
        registry = self._registry = CollectorRegistry()
        self.accepted = Counter("wanjax_videos_accepted", "requests that became jobs", registry=registry)
        self.refused = Counter("wanjax_videos_refused", "those that did not", ["status"], registry=registry)
        self._ended = Counter("wanjax_videos_ended", "jobs that are over, by state", ["state"], registry=registry)
        self._seconds = Histogram(
            "wanjax_video_seconds", "of a completed job, without waiting", buckets=SECONDS, registry=registry
        )
        self._stages = Counter("wanjax_stage_seconds", "of completed jobs, by stage", ["stage"], registry=registry)
        if jobs is not None:
            for state in ("queued", "running"):
                gauge = Gauge(f"wanjax_videos_{state}", f"jobs that are {state}", registry=registry)
                gauge.set_function(lambda state=state: jobs.count(state))

    def completed(self, timings: dict[str, float], seconds: float) -> None:
        """A job has its video."""
        self._seconds.observe(seconds)
        for stage, spent in timings.items():
            self._stages.labels(stage).inc(spent)
        self.ended("completed")

    def ended(self, state: str) -> None:
        """A job is over."""
        self._ended.labels(state).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

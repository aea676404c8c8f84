"""What every route of a running server may use: `request.app.state.flashlite`."""

from __future__ import annotations

import time

from flashlite.server.config import ServerConfig
from flashlite.server.registry import Registry
from flashlite.server.worker import Worker

__all__ = ["State"]


class State:
    """The models, their workers, and the settings."""

    def __init__(self, registry: Registry, config: ServerConfig) -> None:
        """Start a worker for each model."""
        self.registry = registry
        self.config = config
        self.started = int(time.time())
        self.workers = {name: Worker(model) for name, model in registry.models.items()}

    def worker(self, name: str) -> Worker:
        """Of the model that answers; raises as `Registry.chat`."""
        return self.workers[self.registry.chat(name).name]

    @property
    def load(self) -> tuple[int, int]:
        """Requests (running, waiting)."""
        loads = [worker.dispatch.load for worker in self.workers.values()]
        return sum(running for running, _ in loads), sum(waiting for _, waiting in loads)

    def close(self) -> None:
        """End what is unfinished and release the models."""
        for worker in self.workers.values():
            worker.close()
        self.registry.close()

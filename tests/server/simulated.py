"""An engine and its clients, simulated from a seed: what `Deadlines` is tested on."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

from flashlite.server.deadlines import Deadlines, Progress, Reject
from flashlite.server.foresight import Request, Rules
from flashlite.server.pace import Pace, Shape

Outcome = Literal["complete", "partial", "refused", "gone"]


@dataclass
class Client:
    """A request as the world knows it, and what became of it."""

    request: Request
    length: int  # tokens after which the model would stop
    leaves: float = math.inf
    outcome: Outcome | None = None
    admitted: bool = False
    started: float | None = None
    prefilled: int = 0
    generated: int = 0
    ended: float = math.nan  # when the schedule, or the model, ended it
    written: float = math.nan  # when its last byte was


@dataclass
class World:
    """A machine, the requests that come, and what goes wrong, all from one seed."""

    seed: int
    load: float | None = None  # of what the engine can do; None: random
    calm: bool = False  # no stalls, no jumps of the clock, nobody leaves, everything has a deadline
    names: str | None = None  # of clients, drawn evenly; None: random
    count: int = 40
    clients: list[Client] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)  # begun, ended

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(self.seed)
        self.cost = (
            draw.uniform(0.5e-3, 8e-3),  # a step
            draw.uniform(0.05e-3, 0.5e-3),  # a prompt token
            draw.uniform(0, 2e-7),  # a position that it sees
            draw.uniform(0.05e-3, 1e-3),  # a sequence that decodes
            draw.uniform(0, 1e-6),  # a position that it sees
        )
        self.noise = draw.choice((0.0, 0.02, 0.1, 0.3))
        self.stalls = 0.0 if self.calm else draw.choice((0.0, 0.0, 0.003, 0.02))
        self.write = draw.choice((0.2e-3, 1e-3, 5e-3))
        slots = draw.choice((1, 2, 4, 8))
        self.rules = Rules(slots, draw.choice((1000, 100)), queue=32, patience=3.0)
        self.jump_at = math.inf if self.calm or draw.random() < 0.7 else draw.uniform(0, 3)
        self.jump = draw.choice((-5.0, -0.2, 0.5, 4.0))
        self.clients = self._arrivals()

    def seconds(self, shape: Shape) -> float:
        return sum(c * x for c, x in zip(self.cost, (1, *shape), strict=True))

    def work(self, prompt: int, tokens: int) -> float:
        """Seconds of the engine that a request needs when all slots are always in use."""
        slots = self.rules.slots
        decode = self.seconds(Shape(0, 0, slots, slots * (prompt + tokens / 2))) / slots
        return self.seconds(Shape.chunk(0, prompt)) - self.cost[0] + tokens * decode

    def _arrivals(self) -> list[Client]:
        draw = self.draw
        load = self.load or draw.choice((0.3, 0.8, 1.5, 4.0))
        typical = draw.choice((8, 32, 96))
        prompts = draw.choice((40, 300))
        names = self.names or draw.choice(("a", "ab", "abcd", "aaaaaaab"))
        deadline = draw.choice((0.3, 1.0, 2.0, 4.0))
        without = 0.0 if self.calm else draw.choice((0.0, 0.0, 0.2))
        at, clients = 0.0, []
        for key in range(self.count):
            prompt = 1 + int(draw.expovariate(1 / prompts))
            length = 1 + int(draw.expovariate(1 / typical))
            room = draw.choice((length, 2 * typical, 4 * typical))
            work = self.work(prompts, typical)
            at += draw.expovariate(load / work)
            due = at + deadline * draw.choice((0.5, 1, 1, 2))
            best_effort = draw.random() < without
            leaves = math.inf
            if not self.calm and draw.random() < 0.1:
                leaves = at + draw.uniform(0, deadline)
            pages = min(-(-(prompt + room) // 32), self.rules.pages)
            request = Request(
                key, draw.choice(names), prompt, room, at, None if best_effort else due, pages
            )
            clients.append(Client(request, length, leaves))
        return clients

    def pace(self) -> Pace:
        """As a server has it that has just started: measured, guessed wrongly, or unknown."""
        wrong = 1.0 if self.calm else self.draw.choice((0.0, 0.5, 1.0, 1.0, 2.0))
        shapes = [
            Shape.chunk(0, 256),
            Shape.chunk(256, 256),
            Shape.chunk(0, 64),
            Shape.chunk(64, 64),
        ]
        shapes += [Shape(0, 0, n, n * depth) for n in (1, 2, 4, 8) for depth in (64, 512)]
        return Pace((shape, wrong * self.seconds(shape)) for shape in shapes if wrong)


class Server:
    """The loop of a worker around a simulated engine that plans steps as `Scheduler` does."""

    def __init__(self, world: World, schedule: Deadlines) -> None:
        self.world = world
        self.schedule = schedule
        self.coming = deque(world.clients)
        self.by_key = {client.request.key: client for client in world.clients}
        self.running: list[Client] = []
        self.now = 0.0

    @property
    def clock(self) -> float:
        jumped = self.now >= self.world.jump_at and self.world.jump < 0
        return self.now + (self.world.jump if jumped else 0.0)

    def serve(self) -> None:
        while self.coming or any(client.outcome is None for client in self.world.clients):
            if self.coming and not any(self.schedule.load):
                self.now = max(self.now, self.coming[0].request.arrived)
            self.arrive()
            self.leave()
            for over in self.schedule.expired(self.clock):
                client = self.by_key[over.key]
                assert (over.refused is None) == (client.generated > 0)
                self.end(client, "refused" if over.refused else "partial")
            for request in self.schedule.next_batch(self.clock, self.free):
                client = self.by_key[request.key]
                client.started = self.now
                self.running.append(client)
            assert self.free >= 0
            assert sum(c.request.pages for c in self.running) <= self.world.rules.pages
            if self.running:
                self.step()
            else:
                assert self.schedule.load == (0, 0), "somebody waits, and every slot is free"

    @property
    def free(self) -> int:
        return self.world.rules.slots - len(self.running)

    def arrive(self) -> None:
        while self.coming and self.coming[0].request.arrived <= self.now:
            client = self.coming.popleft()
            request = client.request
            if self.world.jump < 0 and request.arrived >= self.world.jump_at:
                due = request.deadline and request.deadline + self.world.jump
                request = replace(request, arrived=request.arrived + self.world.jump, deadline=due)
            answer = self.schedule.admit(self.clock, request)
            if isinstance(answer, Reject):
                assert answer.retry_after is None or 0 <= answer.retry_after < 1e6
                self.end(client, "refused")
            else:
                client.admitted = True

    def leave(self) -> None:
        for client in self.world.clients:
            if client.outcome is None and client.admitted and client.leaves <= self.now:
                self.schedule.finish(client.request.key)
                self.end(client, "gone")

    def end(self, client: Client, outcome: Outcome) -> None:
        assert client.outcome is None, "a second outcome"
        writing = self.world.write * self.world.draw.lognormvariate(0, 0.3)
        self.schedule.writing.note(writing)
        client.outcome, client.ended, client.written = outcome, self.now, self.now + writing
        if client in self.running:
            self.running.remove(client)

    def step(self) -> None:
        draw, rules = self.world.draw, self.world.rules
        decoding = [client for client in self.running if client.generated]
        left = rules.chunk if decoding else rules.chunk_alone
        prompt, reach, computed = 0, 0.0, []
        for client in self.running:
            tokens = min(left, client.request.prompt - client.prefilled)
            if tokens > 0:
                piece = Shape.chunk(client.prefilled, tokens)
                prompt, reach, left = prompt + tokens, reach + piece.reach, left - tokens
                computed.append((client, tokens))
        depth = sum(client.request.prompt + client.generated for client in decoding)
        shape = Shape(prompt, reach, len(decoding), depth)
        seconds = self.world.seconds(shape) * draw.lognormvariate(0, self.world.noise)
        if draw.random() < self.world.stalls:
            seconds += draw.expovariate(1 / 0.3)
        if self.world.jump > 0 and self.now <= self.world.jump_at < self.now + seconds:
            seconds += self.world.jump  # the machine slept
        self.world.steps.append((self.now, self.now + seconds))
        self.now += seconds
        for client, tokens in computed:
            client.prefilled += tokens
        progress = {}
        for client in list(self.running):
            if client.prefilled == client.request.prompt:
                client.generated += 1
            progress[client.request.key] = Progress(client.prefilled, client.generated)
        self.schedule.stepped(shape, seconds, progress)
        for client in list(self.running):
            if client.generated >= min(client.length, client.request.room):
                self.schedule.finish(client.request.key, tokens=client.generated)
                self.end(client, "complete")


def run(world: World, schedule: type[Deadlines] = Deadlines) -> World:
    Server(world, schedule(world.pace(), world.rules)).serve()
    return world

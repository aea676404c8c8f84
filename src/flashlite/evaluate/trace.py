"""A profile as a trace: the JSON of Chrome's trace events, which ui.perfetto.dev opens.

Every part is a complete event ("ph": "X") of its thread, with its beginning and length in
microseconds; on the calling thread they lie inside one event per step. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashlite.evaluate.marks import Span, spans_of
from flashlite.evaluate.profile import Phase, Profile
from flashlite.evaluate.steps import Step

__all__ = ["trace_events"]

_PROCESS = 1


def trace_events(profile: Profile) -> dict[str, Any]:
    """The trace as a JSON object; time begins with the first step."""
    phases = (profile.prefill, profile.decode)
    origin = min((phase.steps[0].start for phase in phases if phase.steps), default=0)
    events = [_named("process_name", None, f"flashlite {profile.model}")]
    for thread in range(profile.threads):
        events.append(_named("thread_name", thread, "caller" if not thread else f"pool {thread}"))
    for phase in phases:
        for step in phase.steps:
            events += _step_events(phase, step, origin)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "model": profile.model,
            "artifact": profile.artifact,
            "isa": profile.isa,
            "threads": profile.threads,
            "lost_marks": profile.lost,
        },
    }


def _step_events(phase: Phase, step: Step, origin: int) -> Iterator[dict[str, Any]]:
    whole = Span(f"{phase.name}: {step.tokens} at {step.position}", None, step.start, step.end)
    yield _complete(whole, phase.name, 0, origin)
    for thread, marks in enumerate(step.marks):
        for span in spans_of(marks) if thread else step.spans():
            if span.end > span.start:
                yield _complete(span, phase.name, thread, origin)


def _complete(span: Span, phase: str, thread: int, origin: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if span.layer is None else {"layer": span.layer}
    if span.waited:
        arguments["waited_us"] = span.waited / 1e3
    return {
        "name": span.part,
        "cat": phase,
        "ph": "X",
        "ts": (span.start - origin) / 1e3,
        "dur": (span.end - span.start) / 1e3,
        "pid": _PROCESS,
        "tid": thread,
        "args": arguments,
    }


def _named(kind: str, thread: int | None, name: str) -> dict[str, Any]:
    where = {} if thread is None else {"tid": thread}
    return {"name": kind, "ph": "M", "pid": _PROCESS, **where, "args": {"name": name}}

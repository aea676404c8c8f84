"""What all protocols share: an `Ask` goes in, events come out.

    body ── decode.py ──> Ask ── answer.py ──> events ── encode.py ──> wire

Nothing here knows a protocol. Every protocol is two pure halves: one makes an `Ask` of a body, the
other makes its wire format of events. An answer is `Started`, then for each choice any number of
`TextDelta`, `CallStarted` and `CallArguments` and one `Finished`, then `Ended`; choices come mixed.
What goes wrong is a `FlashliteError` raised instead of the next event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from flashlite.runtime.sampler import Drawn
from flashlite.runtime.sampling import SamplingParams

__all__ = [
    "Ask",
    "CallArguments",
    "CallStarted",
    "Dropped",
    "Ended",
    "Event",
    "Finished",
    "Format",
    "Reason",
    "Role",
    "Started",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "Turn",
    "Usage",
]

Role = Literal["system", "user", "assistant", "tool"]
Reason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "deadline"]


# What is asked


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made."""

    id: str
    name: str
    arguments: str  # JSON text of an object


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; what OpenAI calls `developer` is `system`."""

    role: Role
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str | None = None  # of a tool: which call this answers, where the client says
    name: str | None = None  # of a tool: which one answered


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client can run."""

    name: str
    description: str = ""
    # JSON schema of an object; lower-case types, whatever the protocol writes.
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | tuple[str, ...]
"""A tuple names the tools of which one must be called."""


@dataclass(frozen=True, slots=True)
class Format:
    """What the text must be.

    Example:
        Format("json_schema", schema={"type": "object"})
        Format("enum", values=("yes", "no"))
    """

    kind: Literal["text", "json_object", "json_schema", "enum"] = "text"
    schema: Mapping[str, Any] | bool | None = None  # of json_schema
    strict: bool = True  # of json_schema; the schema is enforced either way
    values: tuple[str, ...] = ()  # of enum: the text is one of these, without quotes


@dataclass(frozen=True, slots=True)
class Ask:
    """One question, whatever protocol it came by: either `turns` or a `prompt`."""

    model: str = ""  # "": the server's first
    turns: tuple[Turn, ...] = ()
    prompt: str | tuple[int, ...] | None = None  # to be continued as it stands: text, or token ids
    tools: tuple[Tool, ...] = ()  # none where the choice is "none" or the list is empty
    tool_choice: ToolChoice = "auto"
    parallel_tools: bool = True  # several calls in one answer
    format: Format = field(default_factory=Format)
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # answers, drawn apart from one prompt
    deadline_s: float | None = None  # seconds from the head of the request; None: the server's
    client: str = ""  # address or key id; clients take turns
    language: Literal["en", "es"] = "en"  # of messages


# What comes back


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took; tokens of all choices together, the prompt counted once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: found stored instead of computed
    completion_tokens: int = 0
    prompt_seconds: float = 0.0  # from submission to the first token
    completion_seconds: float = 0.0  # from the first token to the last

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Dropped:
    """A part of the input that the model did not read, since the window policy left it out."""

    what: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted and its first token is there: what is refused is so before."""

    usage: Usage  # of the prompt


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of a choice's text, and the tokens drawn for it.

    Either may be empty: a stop string is held back until it is none, and a character may take
    several tokens.
    """

    choice: int
    text: str
    drawn: tuple[Drawn, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A tool call whose name is known; `index` counts the calls of the choice from 0."""

    choice: int
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    choice: int
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The choice is complete."""

    choice: int
    reason: Reason
    stop: str | None = None  # the stop string that was met


@dataclass(frozen=True, slots=True)
class Ended:
    """All choices are complete."""

    usage: Usage
    dropped: tuple[Dropped, ...] = ()


Event: TypeAlias = Started | TextDelta | CallStarted | CallArguments | Finished | Ended

"""Messages of the WebSocket: their schemas, and the errors for invalid ones.

Names and semantics follow vLLM-Omni's `/v1/realtime/video`, so that clients can be shared; docs/serve.md has the table.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

MAX_PROMPT = 2000  # in characters
MAX_MESSAGE = 16 * 2**10  # in bytes
MAX_FRAMES = 2**31
ERROR_LENGTH = 300  # maximum number of characters in an error message to a client

# WebSocket close codes (RFC 6455 and its registry).
NORMAL, POLICY, TOO_BIG, BROKEN, RESTART, LATER = 1000, 1008, 1009, 1011, 1012, 1013


class RequestError(ValueError):
    """An error that rejects a client's message.

    Attributes:
      code: machine-readable code.
      event_id: id of the interaction that caused it.
    """

    def __init__(self, code: str, message: str, event_id: str | None = None):
        """Stores the code and the event_id; cuts the message to `ERROR_LENGTH`."""
        super().__init__(message[:ERROR_LENGTH])
        self.code, self.event_id = code, event_id

    def message(self, request_id: str | None = None) -> dict[str, Any]:
        """The error as a message to the client."""
        ids = {"request_id": request_id, "event_id": self.event_id}
        return {"type": "error", "code": self.code, "message": str(self)} | {k: v for k, v in ids.items() if v}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def checked_prompt(value: str) -> str:
    """Strips white space from a prompt; rejects empty prompts and control characters."""
    if not value.strip():
        raise ValueError("must not be empty")
    if any(ord(c) < 32 and c not in "\n\t" for c in value):
        raise ValueError("must not have control characters")
    return value.strip()


class SessionStart(_Message):
    """Starts the connection's only video."""

    type: Literal["session.start"]
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    model: Annotated[str, Field(max_length=200)] | None = None
    format: Literal["m4s", "jpeg"] = "m4s"
    width: int | None = None
    height: int | None = None
    fps: Annotated[float, Field(ge=1, le=60, allow_inf_nan=False)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    streaming_buffer_seconds: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None

    _checked = field_validator("prompt")(checked_prompt)


class PromptEvent(_Message):
    """The new prompt of an interaction."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]

    _checked = field_validator("prompt")(checked_prompt)


class Interaction(_Message):
    """A prompt change. `mode`, `context_timestep` and `fade` are those of `sf_jax.Stream.prompt`."""

    event: PromptEvent
    event_id: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=100)] = 0
    mode: Literal["swap", "recache", "flush", "cut"] | None = None
    context_timestep: Annotated[float, Field(ge=0, lt=1000, allow_inf_nan=False)] | None = None
    fade: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None


class SessionInteraction(_Message):
    """Changes the prompt, beginning with the next chunk that has not been generated yet."""

    type: Literal["session.interaction"]
    interaction: Interaction


class SessionPlayback(_Message):
    """The viewer's position; chunks are generated `streaming_buffer_seconds` ahead of it."""

    type: Literal["session.playback"]
    position_seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class SessionControl(_Message):
    """Pauses, resumes, pings or stops the video."""

    type: Literal["session.pause", "session.resume", "session.ping", "session.stop"]


Message = SessionStart | SessionInteraction | SessionPlayback | SessionControl
_TYPES = ("session.start", "session.interaction", "session.playback")
_MESSAGES = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(text: str) -> Message:
    """Parses a client's message.

    Raises:
      RequestError: naming the field and what it allows.
    """
    if len(text) > MAX_MESSAGE:
        raise RequestError("too_large", f"the message has {len(text)} characters: at most {MAX_MESSAGE} are read")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid_json", f"the message is not JSON ({error})") from error
    event_id = None
    if isinstance(value, dict) and isinstance(value.get("interaction"), dict):
        event_id = value["interaction"].get("event_id")
        event_id = event_id if isinstance(event_id, str) and len(event_id) <= 100 else None
    try:
        return _MESSAGES.validate_python(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        raise RequestError("invalid_message", explain(errors), event_id) from error


def _no_constant(name):
    raise ValueError(f"{name} is not a number")


def explain(errors: Sequence[dict[str, Any]]) -> str:
    """The first of pydantic's errors, in one line."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if str(part) not in (*_TYPES, "body")]
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{'.'.join(names) or 'the message'}: {text[:1].lower() + text[1:]}"


@dataclasses.dataclass
class RateLimit:
    """A token bucket: limits how much happens at once and per second.

    Attributes:
      burst: maximum number of tokens at once.
      rate: new tokens per second.
    """

    burst: float
    rate: float
    _left: float | None = None
    _at: float = 0.0

    def allows(self, now: float, count: float = 1) -> bool:
        """Takes `count` tokens if there are enough, and returns whether there were; `now` is in seconds."""
        left = self.burst if self._left is None else min(self.burst, self._left + (now - self._at) * self.rate)
        self._at, self._left = now, left - count if left >= count else left
        return left >= count

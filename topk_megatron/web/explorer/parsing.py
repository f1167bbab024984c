"""Checks what a browser sends. Every number has bounds, and every text a largest length."""

import json
import math
from dataclasses import dataclass
from typing import Any

from topk_megatron.errors import UserError

MAX_BODY = 64 * 1024
MAX_CHARACTERS = 4000
MAX_TOKENS = 256
MAX_NEW_TOKENS = 128
MAX_VALUE = 1e4
MAX_TEMPERATURE = 5.0
OPERATIONS = ("add", "set", "scale")


class RequestError(UserError):
    """A request cannot be answered; `status` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class SteerRequest:
    """A continuation to generate twice, unsteered and steered.

    Attributes:
        prompt: the text to continue.
        layer: the layer of the neuron.
        neuron: the neuron whose value is changed at every position.
        op: ``add``, ``set`` or ``scale``, as in `Intervention`.
        value: the operand of `op`.
        new_tokens: length of the continuation in tokens.
        temperature: temperature of sampling; 0 always takes the most likely token.
        seed: seed of the random numbers, which are the same for both continuations.
    """

    prompt: str
    layer: int
    neuron: int
    op: str
    value: float
    new_tokens: int
    temperature: float
    seed: int


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in a request's body.

    Raises:
        RequestError: the body is not a JSON object.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the request is not JSON") from error
    if not isinstance(content, dict):
        raise RequestError("the request must be a JSON object")
    return content


def prompt_of(content: dict[str, Any]) -> str:
    """Returns the prompt; refuses one that is empty or too long."""
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("type a prompt first")
    if len(prompt) > MAX_CHARACTERS:
        raise RequestError(
            f"the prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are read"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("the prompt contains half a character (a lone surrogate); delete it")
    return prompt


def integer(content: dict[str, Any], name: str, low: int, high: int) -> int:
    """Returns a whole number from low to high."""
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"{name} must be a whole number from {low} to {high}, got {_short(value)}"
        )
    return value


def real(content: dict[str, Any], name: str, low: float, high: float) -> float:
    """Returns a finite number from low to high."""
    value: Any = content.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {_short(value)}")
    return float(value)


def steer_request(content: dict[str, Any], layers: int, neurons: int) -> SteerRequest:
    """Returns a checked request to steer; the engine checks that the layer has a TopK."""
    op = content.get("op")
    if op not in OPERATIONS:
        raise RequestError(f"op must be one of {', '.join(OPERATIONS)}, got {_short(op)}")
    return SteerRequest(
        prompt=prompt_of(content),
        layer=integer(content, "layer", 0, layers - 1),
        neuron=integer(content, "neuron", 0, neurons - 1),
        op=op,
        value=real(content, "value", -MAX_VALUE, MAX_VALUE),
        new_tokens=integer(content, "new_tokens", 1, MAX_NEW_TOKENS),
        temperature=real(content, "temperature", 0.0, MAX_TEMPERATURE),
        seed=integer(content, "seed", 0, 2**31 - 1),
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

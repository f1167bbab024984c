"""Reading and changing the output of whole decoder layers, for models that have no TopK."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def _hidden(output: Any) -> Tensor:
    # Decoder layers of transformers give a tensor (5.x) or a tuple that begins with it (4.x).
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def reading_layers(
    model: Any, layers: Sequence[int], read: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `read(layer, hidden [b, s, H])` with the output of each of these layers."""

    def make(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: read(layer, _hidden(output))

    handles = [model.model.layers[n].register_forward_hook(make(n)) for n in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing_layers(model: Any, changes: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put `changes[layer](hidden [b, s, H])` in the place of each layer's output."""

    def make(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            hidden = change(_hidden(output))
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return hook

    handles = [
        model.model.layers[n].register_forward_hook(make(change)) for n, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Trains one model under an arm (`arms.py`), and measures it in the same process.

    python -m examples.ladder.trial ARM[:OPTION=VALUE] RESULT FLAGS…

does what pretrain_topk_gpt.py does with these flags, under the arm. At the end the model is
evaluated on --valid-data-path. RESULT receives the loss and, for each TopK layer, how often every
neuron fired and its token entropy. A neuron fires where it is among the k largest of what the next
layer's attention reads, also where nothing is masked.

Arms exist on one rank only, and their models cannot be converted.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from examples.ladder.arms import ARMS, TopK
from examples.ladder.measure import by_neuron, entropy_of
from topk_megatron.analysis.measures import corrected_entropy
from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device
from topk_megatron.files import replacing
from topk_megatron.model.runtime import TopKRuntime


class Trial:
    """A model under an arm: its hooks, and the counts of its evaluation.

    Attributes:
        arm: the arm.
        counts: by layer, how often each neuron fired on each token, int32 [h, vocabulary].
    """

    def __init__(self, arm: TopK) -> None:
        self.arm = arm
        self.counts: dict[int, Tensor] = {}
        self._topk: Any = None
        self._before: dict[int, Tensor] = {}
        self._tokens = torch.empty(0)
        self._models: list[Any] = []
        self._losses: list[tuple[float, float]] = []

    def install(self) -> None:
        """Make this process's models follow the arm, from their first forward pass on."""
        trial = self

        def apply(
            self: TopKRuntime, hidden_states: Tensor, layer: int, *, training: bool
        ) -> Tensor:
            self.count("residual stream", layer, training)
            trial._topk = self
            return trial.arm.leave(hidden_states, trial._before.pop(layer), self, layer)

        TopKRuntime.apply = apply
        register_module_forward_pre_hook(self._before_model)
        register_module_forward_hook(self._after_model, with_kwargs=True)

    def _before_model(self, model: Any, args: tuple[Any, ...]) -> None:
        """Attach the hooks of a new model, and forget the evaluation when training goes on."""
        if not hasattr(model, "decoder"):
            return
        if model not in self._models:
            self._models.append(model)
            self._attach(model)
        self._tokens = args[0]
        if model.training:
            self.counts.clear()
            self._losses.clear()

    def _after_model(self, model: Any, _: Any, kwargs: dict[str, Any], losses: Tensor) -> None:
        if hasattr(model, "decoder") and not model.training:
            masked = losses.float() * kwargs["loss_mask"]
            self._losses.append((masked.sum().item(), kwargs["loss_mask"].sum().item()))

    def _attach(self, model: Any) -> None:
        layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self._vocabulary = model.vocab_size
        for number, layer in layers.items():
            if hasattr(layer, "topk_layer"):
                layer.register_forward_pre_hook(self._remember(number), with_kwargs=True)
                reader = layers[number + 1]
                self._attach_read(reader.input_layernorm, number)
                self._attach_read(reader.pre_mlp_layernorm, None)

    def _remember(self, number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._before[number] = kwargs["hidden_states"] if kwargs else args[0]

        return hook

    def _attach_read(self, norm: Any, number: int | None) -> None:
        """Make a norm read as the arm says; count what it reads of the state of layer `number`."""

        def read(x: Tensor) -> Tensor:
            y = self.arm.read(x, self._topk)
            if number is not None and not norm.training:
                self._count(number, y)
            return y

        if self.arm.after_norm:
            norm.register_forward_hook(lambda _, args, output: read(output))
        else:
            norm.register_forward_pre_hook(lambda _, args: (read(args[0]),))

    def _count(self, layer: int, read: Tensor) -> None:
        width, topk = read.shape[-1], self._topk
        fired = read.float().topk(topk.config.k, dim=-1).indices  # [s, b, k]
        tokens = self._tokens.t().unsqueeze(-1)  # [s, b, 1]
        places = (fired * self._vocabulary + tokens).flatten()
        size = width * self._vocabulary
        counts = self.counts.setdefault(layer, torch.zeros(size, dtype=torch.int32))
        counts += torch.bincount(places, minlength=size).to(torch.int32)

    def loss(self) -> float:
        """Return the loss of the evaluation, in nats a token."""
        return sum(loss for loss, _ in self._losses) / sum(count for _, count in self._losses)

    def entropy_of_tokens(self) -> float:
        """Return the entropy of the evaluated tokens, in bits."""
        counts = next(iter(self.counts.values())).view(-1, self._vocabulary).sum(0).numpy()
        return entropy_of(counts[counts > 0])

    def neurons(self) -> dict[str, dict[str, Any]]:
        """Return activations and token entropy (bits) of all neurons that fired, by layer."""
        found = {}
        for layer, flat in sorted(self.counts.items()):
            counts = flat.view(-1, self._vocabulary).numpy()
            neurons, tokens = counts.nonzero()
            entropy = corrected_entropy(counts[neurons, tokens], neurons, len(counts))
            found[str(layer)] = by_neuron(counts.sum(1), entropy)
        return found


@exit_on_user_error
def main() -> None:
    """Train under an arm, and write what came."""
    text, target = sys.argv[1], Path(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    name, _, options = text.partition(":")
    if name not in ARMS:
        raise SystemExit(f"error: expected an arm of {sorted(ARMS)}, got {name!r}")
    device = prepare_device()
    trial = Trial(ARMS[name](options))
    trial.install()
    from topk_megatron.train.main import run

    run(device)
    with replacing(target) as temporary:
        found = {"arm": text, "loss": trial.loss(), "entropy_of_tokens": trial.entropy_of_tokens()}
        temporary.write_text(json.dumps({**found, "neurons": trial.neurons()}) + "\n")


if __name__ == "__main__":
    main()

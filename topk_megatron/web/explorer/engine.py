"""What the explorer asks of the model: read a prompt, look at a neuron, steer a continuation.

One request has the model at a time: interventions and recordings are put on the model itself.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.analysis.corpus import join_tokens, token_texts
from topk_megatron.analysis.promoted import directions_of
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel
from topk_megatron.web.explorer.requests import (
    MAX_CHARACTERS,
    MAX_NEW_TOKENS,
    MAX_TOKENS,
    RequestError,
    SteerRequest,
)
from topk_megatron.web.explorer.study_cards import StudyCards

_STRONGEST = 12
_DIRECTION_TOKENS = 10
_PATIENCE_SECONDS = 60
_GENERATION_SECONDS = 120


class Engine:
    """One model, and the study of it where there is one.

    Args:
        folder: an exported folder of a TopK LM.
        study: cards of its neurons; None shows only what is live.

    Raises:
        AnalysisError: the model has no TopK layers.
        CheckpointError: the model or its tokenizer cannot be loaded.
    """

    def __init__(self, folder: OpenModel, study: StudyCards | None = None) -> None:
        if not folder.topk_layers:
            raise AnalysisError(
                f"the model in {folder.path} has no TopK layers to explore; give a TopK LM"
            )
        self.folder, self.study = folder, study
        self.model, self.tokenizer = folder.model, folder.tokenizer
        self.texts = token_texts(self.tokenizer, folder.vocab_size)
        self._model_lock, self._generating = threading.Lock(), threading.Lock()
        self._unsteered: tuple[SteerRequest, list[int]] | None = None

    @cached_property
    def _directions(self) -> Any:
        return directions_of(self.model, self.folder.config.get("normalization", "RMSNorm"))

    def describe(self) -> dict[str, Any]:
        """What the page says of the model, and the limits of requests."""
        folder = self.folder
        return {
            "name": folder.path.resolve().name,
            "iteration": folder.iteration,
            "layers": list(folder.topk_layers),
            "neurons": folder.hidden_size,
            "k": folder.topk["k"],
            "study": self.study.name if self.study else None,
            "max_characters": MAX_CHARACTERS,
            "max_tokens": self._max_tokens(1),
            "max_new_tokens": min(MAX_NEW_TOKENS, folder.max_length - 1),
        }

    def read(self, prompt: str) -> dict[str, Any]:
        """The strongest neurons of every layer at every token of the prompt."""
        tokens = self._encode(prompt)
        layers = {
            layer: [_strongest(v, i) for v, i in zip(values, indices, strict=True)]
            for layer, (values, indices) in self._states(tokens).items()
        }
        return {
            "tokens": tokens[0].tolist(),
            "texts": [self.texts[token] for token in tokens[0].tolist()],
            "layers": layers,
        }

    def neuron(self, prompt: str, layer: int, neuron: int) -> dict[str, Any]:
        """One neuron: its value at every token, the tokens it promotes, its card of the study."""
        self._check_layer(layer)
        tokens = self._encode(prompt)
        values, indices = self._states(tokens, (layer,))[layer]
        own = torch.where(indices == neuron, values, 0.0).sum(dim=-1)
        promoted, suppressed = self._directions.top(neuron, neuron + 1, _DIRECTION_TOKENS)
        card, measures, largest = None, [], None
        if self.study is not None:
            card, measures, largest = self.study.card(layer, neuron)
        unit = largest if largest and largest > 0 else float(values.abs().max()) or 1.0
        known = {token for token, _ in promoted[0] + suppressed[0]} | _tokens_of(card)
        return {
            "values": own.tolist(),
            "promoted": promoted[0],
            "suppressed": suppressed[0],
            "unit": unit,
            "unit_of": "its largest value in the study" if unit == largest
            else "the largest value of this layer in the prompt",
            "card": card,
            "measures": measures,
            "missing": self.study.missing if self.study else {},
            "vocabulary": {token: self.texts[token] for token in sorted(known)},
        }  # fmt: skip

    def steer(self, request: SteerRequest) -> dict[str, Any]:
        """Continuations of the prompt, unsteered and steered, as lists of texts of tokens.

        Raises:
            RequestError: another continuation is being generated.
        """
        self._check_layer(request.layer)
        tokens = self._encode(request.prompt, request.new_tokens)
        if not self._generating.acquire(blocking=False):
            raise RequestError("another continuation is being generated; try again soon", 409)
        try:
            plain = replace(request, layer=0, neuron=0, op="add", value=0.0)
            if self._unsteered is None or self._unsteered[0] != plain:
                with self._own_model():
                    self._unsteered = plain, self._generate(tokens, request)
            unsteered = self._unsteered[1]
            change = self._intervention(request)
            with self._own_model(), self.model.intervene(change):
                steered = self._generate(tokens, request)
        finally:
            self._generating.release()
        return {"unsteered": self._shown(unsteered), "steered": self._shown(steered)}

    def _shown(self, tokens: list[int]) -> dict[str, Any]:
        texts = [self.texts[token] for token in tokens]
        return {"tokens": tokens, "text": join_tokens(texts)}

    @contextmanager
    def _own_model(self) -> Iterator[None]:
        if not self._model_lock.acquire(timeout=_PATIENCE_SECONDS):
            raise RequestError("the model is busy; try again soon", 409)
        try:
            yield
        finally:
            self._model_lock.release()

    def _max_tokens(self, new_tokens: int) -> int:
        return min(MAX_TOKENS, self.folder.max_length - new_tokens)

    def _encode(self, prompt: str, new_tokens: int = 1) -> Tensor:
        """Token ids [1, s]."""
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        limit = self._max_tokens(new_tokens)
        if not 0 < tokens.shape[1] <= limit:
            raise RequestError(
                f"the prompt has {tokens.shape[1]} tokens; 1 to {limit} can be read"
                + (f" with {new_tokens} to generate" if new_tokens > 1 else "")
            )
        return tokens.to(self.folder.device)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.folder.topk_layers:
            known = ", ".join(map(str, self.folder.topk_layers))
            raise RequestError(f"layer {layer} has no TopK; those that have: {known}")

    def _states(
        self, tokens: Tensor, layers: tuple[int, ...] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Values float32 and indices, each [s, k], of every layer."""
        with self._own_model(), torch.inference_mode(), self.model.sparse_states(layers) as states:
            self.model(input_ids=tokens, use_cache=False)
            return {
                layer: (state.values[0].float().cpu(), state.indices[0].cpu())
                for layer, state in states.items()
            }

    def _intervention(self, request: SteerRequest) -> Any:
        """The model's own class: its code may be that of the folder."""
        module = sys.modules[type(self.model).__module__]
        return module.Intervention(
            layer=request.layer, neuron=request.neuron, op=request.op, value=request.value
        )

    def _generate(self, tokens: Tensor, request: SteerRequest) -> list[int]:
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0}
        pad = self.tokenizer.pad_token_id
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(request.seed)
            found = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=request.new_tokens,
                max_time=_GENERATION_SECONDS,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                **sampling,
            )
        return found[0, tokens.shape[1] :].tolist()


def _strongest(values: Tensor, indices: Tensor) -> list[list[float]]:
    """[[neuron, value], …] of one token, by size of the value."""
    order = values.abs().topk(min(_STRONGEST, len(values))).indices
    pairs = zip(indices[order].tolist(), values[order].tolist(), strict=True)
    return [[neuron, round(value, 4)] for neuron, value in pairs if value != 0]


def _tokens_of(card: dict[str, Any] | None) -> set[int]:
    """Every token that a card names."""
    if card is None:
        return set()
    found = {token for example in card.get("examples", []) for token in example[4]}
    pairs = card.get("tokens", []) + card.get("concept", [])
    for side in card.get("measured", {}).values():
        pairs = pairs + side
    return found | {token for token, _ in pairs}


def open_engine(folder: OpenModel, study: Path | None, run: str | None) -> Engine:
    """The engine of a folder, with the study of it."""
    engine = Engine(folder)
    if study is not None:
        engine.study = StudyCards(study, run, folder)
    return engine

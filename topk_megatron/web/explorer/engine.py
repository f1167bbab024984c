"""Answers what the explorer asks: read a prompt, show a neuron, steer a continuation.

Only one request uses the model at a time, because interventions and recordings act on the model
itself.
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
from topk_megatron.analysis.study import list_runs, open_run
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel
from topk_megatron.web.explorer.parsing import (
    MAX_CHARACTERS,
    MAX_NEW_TOKENS,
    MAX_TOKENS,
    RequestError,
    SteerRequest,
)
from topk_megatron.web.shared.cards import CardReader, tokens_of

_STRONGEST = 12
_DIRECTION_TOKENS = 10
_PATIENCE_SECONDS = 60
_GENERATION_SECONDS = 120


class Engine:
    """One model, and its study if there is one.

    Args:
        folder: an exported folder of a TopK LM.
        cards: cards of its neurons; None shows only what the model itself says.

    Raises:
        AnalysisError: the model has no TopK layers.
        CheckpointError: the model or its tokenizer cannot be loaded.
    """

    def __init__(self, folder: OpenModel, cards: CardReader | None = None) -> None:
        if not folder.topk_layers:
            raise AnalysisError(
                f"the model in {folder.path} has no TopK layers to explore; give a TopK LM"
            )
        self.folder, self.cards = folder, cards
        self.model, self.tokenizer = folder.model, folder.tokenizer
        self.texts = token_texts(self.tokenizer, folder.vocab_size)
        self._model_lock, self._generating = threading.Lock(), threading.Lock()
        self._unsteered: tuple[SteerRequest, list[int]] | None = None

    @cached_property
    def _directions(self) -> Any:
        return directions_of(self.model, self.folder.config.get("normalization", "RMSNorm"))

    def describe(self) -> dict[str, Any]:
        """Returns what the page says about the model, and the limits of requests."""
        folder = self.folder
        return {
            "name": folder.path.resolve().name,
            "iteration": folder.iteration,
            "layers": list(folder.topk_layers),
            "neurons": folder.hidden_size,
            "k": folder.topk["k"],
            "study": self._study_name(),
            "max_characters": MAX_CHARACTERS,
            "max_tokens": self._max_tokens(1),
            "max_new_tokens": min(MAX_NEW_TOKENS, folder.max_length - 1),
        }

    def _study_name(self) -> str | None:
        if self.cards is None:
            return None
        return f"{self.cards.study.resolve().name}, run {self.cards.run.name}"

    def read(self, prompt: str) -> dict[str, Any]:
        """Returns the strongest neurons of every layer at every token of the prompt."""
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
        """Returns a neuron's value at every token, the tokens that it promotes, and its card."""
        self._check_layer(layer)
        tokens = self._encode(prompt)
        values, indices = self._states(tokens, (layer,))[layer]
        own = torch.where(indices == neuron, values, 0.0).sum(dim=-1)
        promoted, suppressed = self._directions.top(neuron, neuron + 1, _DIRECTION_TOKENS)
        card = self.cards.card(layer, neuron) if self.cards else None
        measures = self.cards.measured(layer, neuron) if self.cards else []
        largest = next((one["value"] for one in measures if one["key"] == "max"), None)
        unit = largest if largest and largest > 0 else float(values.abs().max()) or 1.0
        known = {token for token, _ in promoted[0] + suppressed[0]} | tokens_of(card or {})
        return {
            "values": own.tolist(),
            "promoted": promoted[0],
            "suppressed": suppressed[0],
            "unit": unit,
            "unit_of": "its largest value in the study" if unit == largest
            else "the largest value at this layer in the prompt",
            "card": card,
            "measures": measures,
            "missing": self.cards.missing if self.cards else {},
            "vocabulary": {token: self.texts[token] for token in sorted(known)},
        }  # fmt: skip

    def steer(self, request: SteerRequest) -> dict[str, Any]:
        """Returns the prompt's unsteered and steered continuations, as tokens and as text.

        Raises:
            RequestError: another continuation is being generated.
        """
        self._check_layer(request.layer)
        tokens = self._encode(request.prompt, request.new_tokens)
        if not self._generating.acquire(blocking=False):
            raise RequestError(
                "another continuation is being generated; try again in a moment", 409
            )
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
            raise RequestError("the model is busy; try again in a moment", 409)
        try:
            yield
        finally:
            self._model_lock.release()

    def _max_tokens(self, new_tokens: int) -> int:
        return min(MAX_TOKENS, self.folder.max_length - new_tokens)

    def _encode(self, prompt: str, new_tokens: int = 1) -> Tensor:
        """Returns token ids [1, s]."""
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        limit = self._max_tokens(new_tokens)
        if not 0 < tokens.shape[1] <= limit:
            raise RequestError(
                f"the prompt has {tokens.shape[1]} tokens; 1 to {limit} can be read"
                + (f" when {new_tokens} are to be generated" if new_tokens > 1 else "")
            )
        return tokens.to(self.folder.device)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.folder.topk_layers:
            known = ", ".join(map(str, self.folder.topk_layers))
            raise RequestError(f"layer {layer} has no TopK; the layers that have one are {known}")

    def _states(
        self, tokens: Tensor, layers: tuple[int, ...] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Returns float32 values and indices, each [s, k], for every layer."""
        with self._own_model(), torch.inference_mode(), self.model.sparse_states(layers) as states:
            self.model(input_ids=tokens, use_cache=False)
            return {
                layer: (state.values[0].float().cpu(), state.indices[0].cpu())
                for layer, state in states.items()
            }

    def _intervention(self, request: SteerRequest) -> Any:
        """Returns the model's own Intervention, because its code may be the folder's."""
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
    """Returns one token's [[neuron, value], …], the largest absolute value first."""
    order = values.abs().topk(min(_STRONGEST, len(values))).indices
    pairs = zip(indices[order].tolist(), values[order].tolist(), strict=True)
    return [[neuron, round(value, 4)] for neuron, value in pairs if value != 0]


def open_engine(folder: OpenModel, study: Path | None, run: str | None) -> Engine:
    """Returns the engine of a model, with cards of its neurons if there is a study.

    Args:
        folder: an exported folder of a TopK LM.
        study: a study directory.
        run: one of its runs; None takes the run that was recorded from this model.

    Raises:
        AnalysisError: the model has no TopK layers, or the study has no run of this model.
        CheckpointError: the model or its tokenizer cannot be loaded.
    """
    engine = Engine(folder)
    if study is not None:
        engine.cards = _open_cards(study, run or _run_of(study, folder), folder)
    return engine


def _open_cards(study: Path, name: str, folder: OpenModel) -> CardReader:
    run = open_run(study, name)
    if run.manifest["model"]["fingerprint"] != folder.fingerprint():
        raise AnalysisError(
            f"the run {name} of {study} was recorded from another model than {folder.path}; leave "
            "--run out to take the one that was recorded from it"
        )
    if run.kind != "topk":
        raise AnalysisError(
            f"the run {name} is of kind {run.kind}; the explorer shows runs of a TopK LM"
        )
    return CardReader(study, run)


def _run_of(study: Path, folder: OpenModel) -> str:
    fingerprint = folder.fingerprint()
    for name in list_runs(study):
        manifest = open_run(study, name).manifest
        if manifest["model"]["fingerprint"] == fingerprint and manifest["kind"] == "topk":
            return name
    raise AnalysisError(
        f"{study} has no run that was recorded from the model in {folder.path}; record one, or "
        "start without --study"
    )

"""The TopK language model for transformers 4.57 and 5.x, which needs no other package.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with model.sparse_states() as states:
        model(**tokenizer("To be", return_tensors="pt"))
    states[2].values, states[2].indices                        # [b, s, k] each
    with model.intervene(Intervention(layer=2, neuron=17, op="set", value=4.0)):
        model.generate(...)

Caching, masks, generation and the loss are Llama's own code; the layers are in `layers_topk`.
transformers 4 copies only the files that this one imports itself, so it must import every sibling.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .activation_topk import (
    Batch,
    Intervention,
    SparseState,
    SparseStates,
    TopKActivation,
    installed,
)
from .configuration_topk import TopKLMConfig
from .layers_topk import (
    TopKDecoderLayer,
    TopKLMAttention,
    TopKLMRotaryEmbedding,
    TopKLMRouter,
    make_norm,
)
from .selection_topk import FUSED

__all__ = [
    "Intervention",
    "SparseState",
    "SparseStates",
    "TopKLMConfig",
    "TopKLMForCausalLM",
    "TopKLMModel",
]


class TopKLMPreTrainedModel(LlamaPreTrainedModel):
    """What transformers needs to know about the architecture."""

    config_class = TopKLMConfig
    # Whether topk_megatron's operator selects, or the definition, with equal results.
    fused_topk = FUSED
    _no_split_modules = ("TopKDecoderLayer",)
    _can_record_outputs = {"hidden_states": TopKDecoderLayer, "attentions": TopKLMAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TopKLMRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @property
    def topk_layers(self) -> tuple[int, ...]:
        """The layers with a sparse output, from 0; empty for a dense model."""
        return tuple(self._activations("residual"))

    @contextmanager
    def sparse_states(
        self, layers: Sequence[int] | None = None, *, site: str = "residual"
    ) -> Iterator[SparseStates]:
        """Record the sparse states of every forward pass in the block, including `generate`.

        Args:
            layers: TopK layers to record, from 0; None records all of them.
            site: ``residual``, or ``mlp`` for the TopK inside the MLPs.

        Raises:
            ValueError: a layer has no TopK at this site, or gradient checkpointing is on, which
                would record every state twice.
        """
        activations = self._activations(site)
        layers = tuple(activations) if layers is None else tuple(layers)
        self._check_ready()
        states = SparseStates([self._known_layer(n, activations, site) for n in layers])
        with installed([(activations[n].readers, states.read) for n in layers]):
            yield states

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator[None]:
        """Change neurons in every forward pass in the block, including `generate`.

        Several changes of one neuron are made in the given order, and contexts can be nested. If
        there is a backward pass, keep the context open until it ends.

        Raises:
            ValueError: a layer has no TopK, a neuron is out of range, or gradient checkpointing
                is on.
        """
        self._check_ready()
        batch = Batch()
        edits = []
        for change in interventions:
            activations = self._activations(change.site)
            layer = self._known_layer(change.layer, activations, change.site)
            mlp = change.site == "mlp"
            size = self.config.intermediate_size if mlp else self.config.hidden_size
            if not 0 <= change.neuron < size:
                raise ValueError(f"neuron must be in [0, {size - 1}], got {change.neuron}")
            edits.append((activations[layer].edits, (change, batch)))
        base = getattr(self, self.base_model_prefix, self)
        hook = base.register_forward_pre_hook(_announce(batch), with_kwargs=True)
        try:
            with installed(edits):
                yield
        finally:
            hook.remove()

    def _activations(self, site: str) -> dict[int, TopKActivation]:
        """Return the TopK activations of one site by layer, without those inside experts."""
        layers: Any = getattr(self, self.base_model_prefix, self).layers
        holders = [layer.mlp if site == "mlp" else layer for layer in layers]
        return {n: holder.topk for n, holder in enumerate(holders) if hasattr(holder, "topk")}

    @staticmethod
    def _known_layer(layer: int, activations: dict[int, TopKActivation], site: str) -> int:
        if layer not in activations:
            known = ", ".join(map(str, activations)) or "none: the model is dense there"
            raise ValueError(
                f"layer {layer} has no TopK at the {site} site; layers that have one: {known}"
            )
        return layer

    def _check_ready(self) -> None:
        if self.training and any(
            getattr(m, "gradient_checkpointing", False) for m in self.modules()
        ):
            raise ValueError(
                "gradient checkpointing runs layers twice, perhaps the second time after this "
                "context ends; call model.gradient_checkpointing_disable() or model.eval() first"
            )


def _announce(batch: Batch) -> Any:
    """Return a hook that sets the tokens and positions of the next forward pass in `batch`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = tokens if tokens is not None else embeds
        assert given is not None
        batch.tokens = tokens
        length = given.shape[1]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        if isinstance(mask, Tensor) and mask.dim() == 2:
            batch.positions = (mask.long().cumsum(dim=-1) - 1)[:, seen : seen + length]
        elif kwargs.get("position_ids") is not None:
            batch.positions = kwargs["position_ids"]
        else:
            batch.positions = (torch.arange(length, device=given.device) + seen).unsqueeze(0)

    return hook


class TopKLMModel(TopKLMPreTrainedModel, LlamaModel):
    """The decoder without its output layer."""

    def __init__(self, config: TopKLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            TopKDecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = TopKLMRotaryEmbedding(config=config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()


class TopKLMForCausalLM(TopKLMPreTrainedModel, LlamaForCausalLM):
    """The decoder with its output layer: logits [b, s, vocab_size]."""

    def __init__(self, config: TopKLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = TopKLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


TopKLMConfig.register_for_auto_class()
TopKLMModel.register_for_auto_class("AutoModel")
TopKLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

"""The mapping of weights between Megatron and Hugging Face, as data; used in both directions.

A row names a Megatron tensor, the Hugging Face tensors that it becomes, how it is cut into them,
its shape, and when a model has it. Names may contain {layer} and {expert}. Shapes are words that
`sizes` gives numbers to. Legend: fc1 and fc2 are the two matrices of an MLP; a gated MLP's fc1 is
[gate; up]; the queries, keys and values of linear_qkv come a key-value group at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Where = Literal["model", "layer", "dense layer", "moe layer", "expert"]
Config = dict[str, Any]

_QKV = tuple(f"model.layers.{{layer}}.self_attn.{part}_proj" for part in "qkv")
_HF = "model.layers.{layer}"
_MLP = f"{_HF}.mlp"
_EXPERT = f"{_MLP}.experts.{{expert}}"
_SHARED = f"{_MLP}.shared_expert"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        megatron: key in the checkpoint; of a layer's row the part after ``decoder.layers.N.``.
        huggingface: the tensors it becomes, in order.
        shape: of the Megatron tensor of one layer (and one expert).
        split: how it is cut; a key of `topk_megatron.hf.splits.SPLITS`.
        where: which part of the model has it.
        when: a key of `CONDITIONS`.
        alias: another key that means the same, written by other layer specs.
        buffer: not a weight: keeps its dtype whatever the weights are converted to.
    """

    megatron: str
    huggingface: tuple[str, ...]
    shape: tuple[str, ...]
    split: str = "copy"
    where: Where = "layer"
    when: str = "always"
    alias: str | None = None
    buffer: bool = False


CONDITIONS: dict[str, Callable[[Config], bool]] = {
    "always": lambda c: True,
    "layer norm": lambda c: c["normalization"] == "LayerNorm",
    "untied": lambda c: not c["tie_word_embeddings"],
    "qkv bias": lambda c: c["attention_bias"],
    "output bias": lambda c: c["attention_output_bias"],
    "mlp bias": lambda c: c["mlp_bias"],
    "qk norm": lambda c: c["qk_norm"],
    "qk layer norm": lambda c: c["qk_norm"] and c["normalization"] == "LayerNorm",
    "gated": lambda c: c["gated_mlp"],
    "not gated": lambda c: not c["gated_mlp"],
    "gated, bias": lambda c: c["gated_mlp"] and c["mlp_bias"],
    "not gated, bias": lambda c: not c["gated_mlp"] and c["mlp_bias"],
    "router bias": lambda c: c["router_bias"],
    "shared, gated": lambda c: c["shared_expert_intermediate_size"] > 0 and c["gated_mlp"],
    "shared, not gated": lambda c: c["shared_expert_intermediate_size"] > 0 and not c["gated_mlp"],
    "shared": lambda c: c["shared_expert_intermediate_size"] > 0,
}


def _norm(megatron: str, huggingface: str, where: Where = "layer", alias: str | None = None) -> Any:
    """A norm's weight and, in a LayerNorm, its bias."""
    name = "{}_{}" if megatron.endswith("layer_norm") else "{}.{}"
    return tuple(
        Row(
            name.format(megatron, part),
            (f"{huggingface}.{part}",),
            ("hidden",),
            where=where,
            when=when,
            alias=f"{alias}.{part}" if alias else None,
        )
        for part, when in (("weight", "always"), ("bias", "layer norm"))
    )


def _mlp(megatron: str, huggingface: str, size: str, where: Where) -> Any:
    """The two matrices of an MLP, gated or not, with their biases."""
    gate_up = (f"{huggingface}.gate_proj", f"{huggingface}.up_proj")
    up = (f"{huggingface}.up_proj",)
    rows = []
    for part, gated, plain, dims in (
        ("weight", "gated", "not gated", ("hidden",)),
        ("bias", "gated, bias", "not gated, bias", ()),
    ):
        fc1, fc2 = f"{megatron}.linear_fc1.{part}", f"{megatron}.linear_fc2.{part}"
        both = tuple(f"{name}.{part}" for name in gate_up)
        single = tuple(f"{name}.{part}" for name in up)
        rows.append(Row(fc1, both, (f"2 {size}", *dims), "gate and up", where, gated))
        rows.append(Row(fc1, single, (size, *dims), where=where, when=plain))
        down = ("hidden", size) if part == "weight" else ("hidden",)
        when = "always" if part == "weight" else "mlp bias"
        rows.append(Row(fc2, (f"{huggingface}.down_proj.{part}",), down, where=where, when=when))
    return tuple(rows)


def _shared_expert() -> Any:
    """Megatron gives shared experts no biases."""
    fc1, fc2 = "mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"
    gate, up, down = (f"{_SHARED}.{name}_proj.weight" for name in ("gate", "up", "down"))
    both = ("2 shared ffn", "hidden")
    return (
        Row(fc1, (gate, up), both, "gate and up", "moe layer", "shared, gated"),
        Row(fc1, (up,), ("shared ffn", "hidden"), "copy", "moe layer", "shared, not gated"),
        Row(fc2, (down,), ("hidden", "shared ffn"), "copy", "moe layer", "shared"),
    )


def _qk_norm(letter: str) -> Any:
    megatron, huggingface = f"self_attention.{letter}_layernorm", f"{_HF}.self_attn.{letter}_norm"
    return tuple(
        Row(f"{megatron}.{part}", (f"{huggingface}.{part}",), ("head",), when=when)
        for part, when in (("weight", "qk norm"), ("bias", "qk layer norm"))
    )


_LINEAR_QKV = "self_attention.linear_qkv"
_OUTPUT = "self_attention.linear_proj"
_WEIGHTS, _BIASES = (tuple(f"{n}.{part}" for n in _QKV) for part in ("weight", "bias"))

# Hugging Face's Llama names; every export uses this table.
TOPK_LM: tuple[Row, ...] = (
    Row(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ("vocabulary", "hidden"),
        "vocabulary",
        "model",
    ),
    *_norm(f"{_LINEAR_QKV}.layer_norm", f"{_HF}.input_layernorm", alias="input_layernorm"),
    Row(f"{_LINEAR_QKV}.weight", _WEIGHTS, ("qkv", "hidden"), "qkv"),
    Row(f"{_LINEAR_QKV}.bias", _BIASES, ("qkv",), "qkv", when="qkv bias"),
    *_qk_norm("q"),
    *_qk_norm("k"),
    Row(f"{_OUTPUT}.weight", (f"{_HF}.self_attn.o_proj.weight",), ("hidden", "heads")),
    Row(f"{_OUTPUT}.bias", (f"{_HF}.self_attn.o_proj.bias",), ("hidden",), when="output bias"),
    *_norm(
        "mlp.linear_fc1.layer_norm",
        f"{_HF}.post_attention_layernorm",
        alias="pre_mlp_layernorm",
    ),
    *_mlp("mlp", _MLP, "ffn", "dense layer"),
    Row("mlp.router.weight", (f"{_MLP}.gate.weight",), ("experts", "hidden"), where="moe layer"),
    Row(
        "mlp.router.expert_bias",
        (f"{_MLP}.gate.expert_bias",),
        ("experts",),
        where="moe layer",
        when="router bias",
        buffer=True,
    ),
    *_mlp("mlp.experts.experts", _EXPERT, "expert ffn", "expert"),
    *_shared_expert(),
    *_norm("decoder.final_layernorm", "model.norm", "model"),
    Row(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocabulary", "hidden"),
        "vocabulary",
        "model",
        "untied",
    ),
)

# Keys of a checkpoint that are not the model, by their beginnings.
NOT_THE_MODEL = ("optimizer", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
# State of Transformer Engine's modules (scales of fp8); empty in Megatron's own.
EXTRA_STATE = "._extra_state"


@dataclass(frozen=True)
class Piece:
    """A row at one place of a model.

    Attributes:
        row: the table's line.
        layer: from 0, or None.
        expert: from 0, or None.
    """

    row: Row
    layer: int | None = None
    expert: int | None = None

    @property
    def huggingface(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors."""
        return tuple(n.format(layer=self.layer, expert=self.expert) for n in self.row.huggingface)


def pieces(config: Config) -> Iterator[Piece]:
    """Every piece of the model that `config` describes, in the order of the exported file."""
    for row in TOPK_LM[:1]:
        yield Piece(row)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer_pieces(config, layer)
    for row in TOPK_LM[1:]:
        if row.where == "model" and CONDITIONS[row.when](config):
            yield Piece(row)


def _layer_pieces(config: Config, layer: int) -> Iterator[Piece]:
    kind = "moe layer" if layer in config["moe_layers"] else "dense layer"
    for row in TOPK_LM:
        if row.where in ("layer", kind) and CONDITIONS[row.when](config):
            yield Piece(row, layer)
    if kind == "moe layer":
        for expert in range(config["num_experts"]):
            for row in TOPK_LM:
                if row.where == "expert" and CONDITIONS[row.when](config):
                    yield Piece(row, layer, expert)


def sizes(config: Config, padded_vocabulary: int) -> dict[str, int]:
    """Numbers for the words in `Row.shape`."""
    head, groups = config["head_dim"], config["num_key_value_heads"]
    ffn, expert = config["intermediate_size"], config["moe_intermediate_size"] or 0
    shared = config["shared_expert_intermediate_size"]
    return {
        "vocabulary": padded_vocabulary,
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"] * head,
        "head": head,
        "qkv": (config["num_attention_heads"] + 2 * groups) * head,
        "ffn": ffn,
        "2 ffn": 2 * ffn,
        "experts": config["num_experts"],
        "expert ffn": expert,
        "2 expert ffn": 2 * expert,
        "shared ffn": shared,
        "2 shared ffn": 2 * shared,
    }

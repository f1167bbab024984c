"""The shape of a model: every parameter that a rank holds, from Megatron's own flags.

Parameters are counted exactly, tensor by tensor; the dry run checks the same list against the model
that Megatron builds. Everything else in this package is an estimate that starts from it.

Symbols: V padded vocabulary, H hidden, F ffn, A query heads, G key and value heads, D their size, t
tensor-parallel ranks.
"""

from dataclasses import dataclass
from math import prod

from topk_megatron.config import TopKConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder with TopK layers, and the batch that it is trained with.

    Attributes:
        layers: Transformer layers of the whole model.
        hidden: H, the neurons of the residual stream.
        ffn: F, the width of the MLP.
        heads: A, the query heads.
        groups: G, the key and value heads.
        head_size: D, the size of a head.
        vocabulary: Tokens of the tokenizer.
        vocabulary_multiple: Megatron pads each tensor-parallel rank's share to a multiple of it.
        positions: Rows of a learned position table; 0 with rotary positions.
        gated: Whether the MLP has a gate (``--swiglu``).
        tied: Whether embedding and output weights are one matrix.
        norm_biases: Whether norms have biases.
        biases: Whether linear layers have biases.
        qkv_biases: Whether the first linear layer of attention has biases.
        qk_norm: Whether queries and keys are normalised.
        dropout: Whether hidden states have dropout.
        topk: Settings of the TopK.
        sequence: Tokens per sequence.
        micro_batch: Sequences per microbatch.
        global_batch: Sequences per step.
        iterations: Training steps, None if the flags do not say.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    vocabulary_multiple: int
    positions: int
    gated: bool
    tied: bool
    norm_biases: bool
    biases: bool
    qkv_biases: bool
    qk_norm: bool
    dropout: bool
    topk: TopKConfig
    sequence: int
    micro_batch: int
    global_batch: int
    iterations: int | None

    @property
    def tokens(self) -> int:
        """Tokens per training step."""
        return self.global_batch * self.sequence

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_size

    @property
    def qkv_width(self) -> int:
        """Width of all queries, keys and values together."""
        return (self.heads + 2 * self.groups) * self.head_size

    def padded(self, tp: int) -> int:
        """Return the vocabulary as Megatron pads it, so that every rank holds a multiple."""
        multiple = self.vocabulary_multiple * tp
        return -(-self.vocabulary // multiple) * multiple

    def layer_shapes(self, tp: int) -> Shapes:
        """Return a layer's parameters on one of `tp` ranks, named as in Megatron's local layer."""
        h, fc1 = self.hidden, self.ffn * (2 if self.gated else 1) // tp
        shapes: Shapes = {
            **self._norm("input_layernorm", h),
            "self_attention.linear_qkv.weight": (self.qkv_width // tp, h),
            "self_attention.linear_proj.weight": (h, self.attention_width // tp),
            **self._norm("pre_mlp_layernorm", h),
            "mlp.linear_fc1.weight": (fc1, h),
            "mlp.linear_fc2.weight": (h, self.ffn // tp),
        }
        if self.biases:
            shapes["self_attention.linear_proj.bias"] = (h,)
            shapes["mlp.linear_fc1.bias"] = (fc1,)
            shapes["mlp.linear_fc2.bias"] = (h,)
        if self.biases or self.qkv_biases:
            shapes["self_attention.linear_qkv.bias"] = (self.qkv_width // tp,)
        if self.qk_norm:
            for name in ("q_layernorm", "k_layernorm"):
                shapes |= self._norm(f"self_attention.{name}", self.head_size)
        return shapes

    def stage_layers(self, pp: int, stage: int) -> range:
        """Return the numbers of a pipeline stage's layers, from 0 over the whole model."""
        size = self.layers // pp
        return range(stage * size, (stage + 1) * size)

    def stage_shapes(self, tp: int, pp: int, stage: int) -> Shapes:
        """Return every parameter of one rank of a pipeline stage, by Megatron's name."""
        shapes: Shapes = {}
        if stage == 0:
            shapes["embedding.word_embeddings.weight"] = (self.padded(tp) // tp, self.hidden)
            if self.positions:
                shapes["embedding.position_embeddings.weight"] = (self.positions, self.hidden)
        for index in range(len(self.stage_layers(pp, stage))):
            layer = self.layer_shapes(tp).items()
            shapes |= {f"decoder.layers.{index}.{name}": size for name, size in layer}
        if stage == pp - 1:
            shapes |= self._norm("decoder.final_layernorm", self.hidden)
            if not self.tied or pp > 1:  # a second copy where the first stage is another rank
                shapes["output_layer.weight"] = (self.padded(tp) // tp, self.hidden)
        return shapes

    def stage_parameters(self, tp: int, pp: int, stage: int) -> int:
        """Return the number of parameters that one rank of a pipeline stage holds."""
        return sum(map(prod, self.stage_shapes(tp, pp, stage).values()))

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.stage_parameters(1, 1, 0)

    def layer_flops(self) -> float:
        """Return the operations of one layer's forward pass per token.

        They are two for each entry of a matrix, and 2 · 2 · s · A D for attention's scores and
        values, halved by the causal mask. Backward takes twice as many.
        """
        matrices = sum(prod(size) for size in self.layer_shapes(1).values() if len(size) == 2)
        return 2 * matrices + 2 * self.sequence * self.attention_width

    def output_flops(self, tp: int) -> float:
        """Return the operations of the output layer's forward pass per token, over all ranks."""
        return 2 * self.padded(tp) * self.hidden

    def model_flops(self) -> float:
        """Return the operations of forward and backward per token, without recompute."""
        return 3 * (self.layers * self.layer_flops() + self.output_flops(1))

    def _norm(self, name: str, size: int) -> Shapes:
        shapes: Shapes = {f"{name}.weight": (size,)}
        if self.norm_biases:
            shapes[f"{name}.bias"] = (size,)
        return shapes

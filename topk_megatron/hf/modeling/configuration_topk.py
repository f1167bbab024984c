"""Configuration of an exported TopK language model (arXiv 2506.21468).

Every TopK setting is explicit and checked. A configuration that lacks one is refused, because a
default would silently give another model. Works with transformers 4.57 and 5.x.
"""

from typing import Any

from transformers import PretrainedConfig

from .selection_topk import KEYS

TOPK_KEYS = ("site", "k", "layers", "mode", "mlp_k", "mlp_groups")
_ALLOWED = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"),
    "router_score_function": ("softmax", "sigmoid"),
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_TYPES = ("default", "linear", "llama3")


class TopKLMConfig(PretrainedConfig):
    """A decoder whose hidden states at chosen layers keep their k largest neurons.

    Args:
        topk: the TopK settings, with exactly these keys: ``site`` (residual, mlp or both), ``k``
            (neurons kept at the residual site), ``layers`` (numbers from 0; a dense model has
            none), ``mode`` (value or abs), ``mlp_k`` and ``mlp_groups`` (for the MLP site, else
            None).
        vocab_size: number of tokens, without the padding that tensor parallelism adds.
        normalization: RMSNorm or LayerNorm, everywhere in the model.
        norm_eps: epsilon of every norm.
        gated_mlp: whether an MLP is ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        qk_norm: whether queries and keys have a norm over head_dim, before the rotation.
        rotary_interleaved: whether to rotate pairs (0, 1), (2, 3), …, else (i, i + d / 2).
        moe_layers: layers that have a mixture of `num_experts` experts as their MLP.
        router_pre_softmax: whether the softmax is over all experts and not only over the chosen.

    The other arguments are Llama's. ``rope_parameters`` (transformers 5) and ``rope_theta`` with
    ``rope_scaling`` (transformers 4) are both written.

    Raises:
        ValueError: names a setting that is missing or out of its domain.
    """

    model_type = "topk_lm"
    keys_to_ignore_at_inference = ("past_key_values",)
    # There is no default model: transformers must not build one to find what differs from it.
    has_no_defaults_at_init = True

    def __init__(
        self,
        topk: dict[str, Any] | None = None,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        normalization: str = "RMSNorm",
        norm_eps: float = 1e-5,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
        rotary_interleaved: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_layers: list[int] | None = None,
        moe_intermediate_size: int | None = None,
        shared_expert_intermediate_size: int = 0,
        router_score_function: str = "softmax",
        router_pre_softmax: bool = False,
        router_scaling_factor: float | None = None,
        router_bias: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.topk: dict[str, Any] = topk or {}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.normalization = normalization
        self.norm_eps = norm_eps
        self.rms_norm_eps = norm_eps  # the name that tools look for
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_output_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.attention_dropout = attention_dropout
        self.partial_rotary_factor = partial_rotary_factor
        self.rotary_interleaved = rotary_interleaved
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layers = list(moe_layers or [])
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router_score_function = router_score_function
        self.router_pre_softmax = router_pre_softmax
        self.router_scaling_factor = router_scaling_factor
        self.router_bias = router_bias
        self.use_cache = use_cache
        self._set_rope(rope_theta, rope_scaling, rope_parameters)
        self._check()
        self._explicit = sorted({*vars(self), *_TOKENS, "tie_word_embeddings"})
        kwargs.pop("rms_norm_eps", None)
        tokens = (bos_token_id, eos_token_id, pad_token_id)
        shared = dict(zip(_TOKENS, tokens, strict=True), tie_word_embeddings=tie_word_embeddings)
        super().__init__(**shared, **kwargs)
        # transformers 4 does not set them where they are None.
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = pad_token_id

    def to_diff_dict(self) -> dict[str, Any]:
        """Return everything that shapes the model, even where it equals some version's default."""
        settings = super().to_diff_dict()
        settings.pop("_explicit", None)
        settings.update({name: getattr(self, name) for name in self._explicit})
        return {**settings, "rope_scaling": self._scaling(self.rope_parameters)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as transformers does, without our own bookkeeping."""
        settings = super().to_dict()
        settings.pop("_explicit", None)
        return settings

    def _set_rope(
        self,
        theta: float | None,
        scaling: dict[str, Any] | None,
        parameters: dict[str, Any] | None,
    ) -> None:
        """Set both spellings: 5.x reads one, and 4.57 silently takes 10000 without the other."""
        given = dict(parameters or {})
        if theta is None:
            theta = given.get("rope_theta")
        if theta is None:
            raise ValueError("rope_theta is missing; write it, or rope_parameters with it")
        if given.get("rope_theta", theta) != theta:
            raise ValueError(
                f"rope_theta is {theta} and rope_parameters says {given['rope_theta']}; make them "
                "equal"
            )
        own = {"rope_theta", "partial_rotary_factor", "type"}
        given = {name: value for name, value in (given or scaling or {}).items() if name not in own}
        given.setdefault("rope_type", (scaling or {}).get("type", "default"))
        if given["rope_type"] not in _ROPE_TYPES:
            raise ValueError(
                f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {given['rope_type']!r}"
            )
        self.rope_theta = theta
        self.rope_parameters = {**given, "rope_theta": theta}
        if not hasattr(PretrainedConfig, "rope_scaling"):  # in 5.x another name of rope_parameters
            self.rope_scaling = self._scaling(self.rope_parameters)

    @staticmethod
    def _scaling(parameters: dict[str, Any]) -> dict[str, Any] | None:
        """Return transformers 4's part of `rope_parameters`: None without a scaling."""
        if parameters["rope_type"] == "default":
            return None
        own = ("rope_theta", "partial_rotary_factor")
        return {name: value for name, value in parameters.items() if name not in own}

    def _check(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads, got {self.num_key_value_heads}"
            )
        _check_layers("moe_layers", self.moe_layers, self.num_hidden_layers)
        if self.moe_layers and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be in [1, num_experts={self.num_experts}], got "
                f"{self.num_experts_per_tok}"
            )
        self._check_topk()

    def _check_topk(self) -> None:
        topk = self.topk
        if not isinstance(topk, dict) or set(topk) != set(TOPK_KEYS):
            found = (sorted(topk) if isinstance(topk, dict) else topk) or "nothing"
            raise ValueError(
                f"topk must have exactly the keys {', '.join(TOPK_KEYS)}, got {found}; this is not "
                "the configuration of a TopK language model, or somebody edited it"
            )
        if topk["site"] not in ("residual", "mlp", "both"):
            raise ValueError(f"topk.site must be residual, mlp or both, got {topk['site']!r}")
        if topk["mode"] not in KEYS:
            raise ValueError(f"topk.mode must be one of {', '.join(KEYS)}, got {topk['mode']!r}")
        _check_layers("topk.layers", topk["layers"], self.num_hidden_layers)
        if not topk["layers"]:
            return
        if topk["site"] != "mlp":
            _check_count("topk.k", topk["k"], "hidden_size", self.hidden_size)
        if topk["site"] != "residual":
            for name, size in self._mlp_sizes():
                _check_mlp(topk, name, size)

    def _mlp_sizes(self) -> list[tuple[str, int]]:
        """Return inner dimensions of the MLPs with a TopK, and the fields that set them."""
        layers, moe = set(self.topk["layers"]), set(self.moe_layers)
        sizes = [("intermediate_size", self.intermediate_size)] if layers - moe else []
        if layers & moe:
            name = "moe_intermediate_size" if self.moe_intermediate_size else "intermediate_size"
            sizes.append((name, self.moe_intermediate_size or self.intermediate_size))
            if self.shared_expert_intermediate_size:
                name = "shared_expert_intermediate_size"
                sizes.append((name, self.shared_expert_intermediate_size))
        return sizes


def _check_mlp(topk: dict[str, Any], name: str, size: int) -> None:
    _check_count("topk.mlp_k", topk["mlp_k"], name, size)
    groups = topk["mlp_groups"]
    if groups is not None and (groups < 1 or size % groups or topk["mlp_k"] % groups):
        raise ValueError(
            f"topk.mlp_groups must divide {name}={size} and mlp_k={topk['mlp_k']}, got {groups}"
        )


def _check_layers(name: str, layers: Any, num_layers: int) -> None:
    sound = isinstance(layers, list | tuple) and all(isinstance(n, int) for n in layers)
    if not sound or list(layers) != sorted(set(layers)):
        raise ValueError(f"{name} must be ascending layer numbers without repetition, got {layers}")
    if layers and not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ValueError(f"{name} must be in 0 to {num_layers - 1}, got {layers}")


def _check_count(name: str, count: Any, size_name: str, size: int) -> None:
    if not isinstance(count, int) or not 1 <= count <= size:
        raise ValueError(f"{name} must be in [1, {size_name}={size}], got {count!r}")

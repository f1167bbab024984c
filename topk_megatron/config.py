"""`TopKConfig`: which layers have a TopK, how many neurons survive, and how k anneals.

The hidden state of a chosen layer keeps its k largest coordinates (TopK Language Models, arXiv
2506.21468, section 3). Layers are counted from 0 over the whole model, whatever the pipeline
layout. Site ``residual`` is the paper's; site ``mlp`` puts the TopK on the MLP's activation
(docs/mlp.md).
"""

import math
import re
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from topk_megatron.errors import ConfigError

Mode = Literal["value", "abs"]
Anneal = Literal["constant", "linear", "cosine", "exponential"]
Site = Literal["residual", "mlp", "both"]

DEFAULT_LAYERS = "all,-2"
# Sets the default k: the sparsest setting at which small models train close to dense.
DEFAULT_HIDDEN_PER_K = 16
_MLP_FIELDS = {"site", "mlp_k", "mlp_groups"}


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """TopK settings of one model, validated on construction.

    Attributes:
        hidden_size: H, the model's hidden size in neurons.
        num_layers: number of transformer layers in the whole model.
        k: neurons of the residual stream that survive at each TopK layer once annealing has ended,
            in [1, hidden_size]. Site ``mlp`` does not use it.
        layers: sorted layer numbers, counted from 0; empty means the dense model.
        mode: ``value`` keeps the largest values, as in the paper; ``abs`` keeps the largest
            magnitudes.
        anneal: how k moves from `anneal_start_k` to `k`; ``exponential`` is linear in log k.
        anneal_start_k: k up to iteration `anneal_begin`.
        anneal_begin: iteration at which k begins to change.
        anneal_end: iteration from which k is final.
        site: where the chosen layers have their TopK: ``residual``, ``mlp`` or ``both``.
        mlp_k: units of the MLP's activation that survive, over the whole FFN dimension; it does not
            anneal. None unless the site includes the MLP.
        mlp_groups: None selects over the whole FFN dimension; G selects mlp_k / G units in each of
            G equal, contiguous groups.

    Raises:
        ConfigError: if a setting is out of range; the message names the flag to change.
    """

    hidden_size: int
    num_layers: int
    k: int
    layers: tuple[int, ...]
    mode: Mode = "value"
    anneal: Anneal = "constant"
    anneal_start_k: int | None = None
    anneal_begin: int = 0
    anneal_end: int = 0
    site: Site = "residual"
    mlp_k: int | None = None
    mlp_groups: int | None = None

    def __post_init__(self) -> None:
        _check_k("topk_k", self.k, self.hidden_size, "--topk-k")
        if self.mode not in get_args(Mode):
            allowed = ", ".join(get_args(Mode))
            raise ConfigError(f"--topk-mode must be one of {allowed}, got {self.mode!r}")
        _check_layers(self.layers, self.num_layers)
        self._check_anneal()
        self._check_mlp()

    def _check_mlp(self) -> None:
        if self.site not in get_args(Site):
            allowed = ", ".join(get_args(Site))
            raise ConfigError(f"--topk-site must be one of {allowed}, got {self.site!r}")
        if self.site == "residual":
            if self.mlp_k is not None or self.mlp_groups is not None:
                raise ConfigError(
                    "--topk-mlp-k and --topk-mlp-groups apply to the MLP's activation, but "
                    "--topk-site is residual; use --topk-site mlp or both, or drop those flags"
                )
            return
        if self.mlp_k is None:
            raise ConfigError(f"--topk-site {self.site} needs --topk-mlp-k")
        if self.mlp_k < 1:
            raise ConfigError(f"--topk-mlp-k must be at least 1, got {self.mlp_k}")
        groups = 1 if self.mlp_groups is None else self.mlp_groups
        if groups < 1 or self.mlp_k % groups:
            raise ConfigError(
                f"--topk-mlp-groups must divide --topk-mlp-k {self.mlp_k} (each group keeps an "
                f"equal share), got {groups}"
            )
        if self.site == "mlp" and self.anneal != "constant":
            raise ConfigError(
                "--topk-anneal changes the residual stream's k, but --topk-site mlp leaves that "
                "stream dense; drop the flag, or use --topk-site both"
            )

    def _check_anneal(self) -> None:
        if self.anneal not in get_args(Anneal):
            allowed = ", ".join(get_args(Anneal))
            raise ConfigError(f"--topk-anneal must be one of {allowed}, got {self.anneal!r}")
        if self.anneal == "constant":
            if self.anneal_start_k is not None or self.anneal_begin or self.anneal_end:
                raise ConfigError(
                    "--topk-anneal is constant, but an annealing start k, begin or end was given; "
                    "choose linear, cosine or exponential, or drop those flags"
                )
            return
        if self.anneal_start_k is not None:
            _check_k(
                "anneal_start_k", self.anneal_start_k, self.hidden_size, "--topk-anneal-start-k"
            )
        if self.anneal_begin < 0:
            raise ConfigError(f"--topk-anneal-begin must be at least 0, got {self.anneal_begin}")
        if self.anneal_end <= self.anneal_begin:
            raise ConfigError(
                f"annealing must end after it begins: --topk-anneal-begin is "
                f"{self.anneal_begin}, --topk-anneal-end is {self.anneal_end}; raise the latter"
            )

    @property
    def start_k(self) -> int:
        """The k before annealing begins: the hidden size (dense) unless the user chose another."""
        if self.anneal == "constant":
            return self.k
        return self.hidden_size if self.anneal_start_k is None else self.anneal_start_k

    @property
    def residual_layers(self) -> tuple[int, ...]:
        """The layers whose output is sparse."""
        return () if self.site == "mlp" else self.layers

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers whose MLP activation is sparse."""
        return () if self.site == "residual" else self.layers

    @classmethod
    def from_args(cls, args: Namespace) -> "TopKConfig":
        """Build from parsed Megatron arguments; a ``--topk-…`` flag left at None is the default."""
        k = args.topk_k
        if k is not None and args.topk_site == "mlp":
            raise ConfigError(
                "--topk-k applies to the residual stream, which --topk-site mlp leaves dense; "
                "use --topk-mlp-k"
            )
        if k is None:
            k = max(1, args.hidden_size // DEFAULT_HIDDEN_PER_K)
        return cls(
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            k=k,
            layers=parse_layers(
                DEFAULT_LAYERS if args.topk_layers is None else args.topk_layers, args.num_layers
            ),
            mode=args.topk_mode or "value",
            anneal=args.topk_anneal or "constant",
            anneal_start_k=args.topk_anneal_start_k,
            anneal_begin=args.topk_anneal_begin or 0,
            anneal_end=anneal_end_of(args),
            site=args.topk_site or "residual",
            mlp_k=args.topk_mlp_k,
            mlp_groups=args.topk_mlp_groups,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as checkpoints store them; `from_dict` is the inverse."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TopKConfig":
        """Rebuild from a checkpoint's settings; a missing or unknown setting is an error.

        Settings written before the MLP site existed lack exactly its three entries; their site is
        ``residual``.
        """
        known = set(cls.__dataclass_fields__)
        if set(settings) == known - _MLP_FIELDS:
            settings = {**settings, "site": "residual", "mlp_k": None, "mlp_groups": None}
        if set(settings) != known:
            odd = ", ".join(sorted(set(settings) ^ known))
            raise ConfigError(f"TopK settings have missing or unknown entries: {odd}")
        return cls(**{**settings, "layers": tuple(settings["layers"])})


def exported_settings(config: TopKConfig | None, iteration: int) -> dict[str, Any]:
    """Return ``topk`` of an exported model's config.json, with the k of the last step taken.

    Args:
        config: the settings of training; None for a model that never had any.
        iteration: number of steps taken.
    """
    if config is None or not config.layers:
        unused = dict.fromkeys(("k", "mlp_k", "mlp_groups"))
        return {"site": "residual", "layers": [], "mode": "value", **unused}
    return {
        "site": config.site,
        "k": k_at(config, max(0, iteration - 1)),
        "layers": list(config.layers),
        "mode": config.mode,
        "mlp_k": config.mlp_k,
        "mlp_groups": config.mlp_groups,
    }


def k_at(config: TopKConfig, iteration: int) -> int:
    """Return the k of the step numbered `iteration`, counted from 0.

    Up to ``anneal_begin`` this is the start k, and from ``anneal_end`` on the final k. In between,
    with p = (iteration - begin) / (end - begin), it is

        linear       k_start + p (k - k_start)
        cosine       k + (k_start - k) (1 + cos(pi p)) / 2
        exponential  k_start (k / k_start)^p        (linear in log k)

    rounded to the nearest integer. The function is pure, so that a resumed run continues where it
    stopped.
    """
    start = config.start_k
    if config.anneal == "constant" or iteration >= config.anneal_end:
        return config.k
    if iteration <= config.anneal_begin:
        return start
    progress = (iteration - config.anneal_begin) / (config.anneal_end - config.anneal_begin)
    if config.anneal == "linear":
        k = start + progress * (config.k - start)
    elif config.anneal == "cosine":
        k = config.k + (start - config.k) * (1 + math.cos(math.pi * progress)) / 2
    else:
        k = start * (config.k / start) ** progress
    return round(k)


def anneal_end_of(args: Namespace) -> int:
    """Return ``--topk-anneal-end``, or halfway from the start of annealing to the end of training.

    The result is 0 where k is constant and no end is given.

    Raises:
        ConfigError: if the length of training is not given in iterations, or training ends before
            annealing begins.
    """
    if args.topk_anneal_end is not None:
        return args.topk_anneal_end
    if args.topk_anneal in (None, "constant"):
        return 0
    if (iterations := getattr(args, "train_iters", None)) is None:
        raise ConfigError("--topk-anneal needs --topk-anneal-end unless --train-iters is given")
    begin = args.topk_anneal_begin or 0
    if begin >= iterations:
        raise ConfigError(
            f"--topk-anneal-begin must be below --train-iters {iterations}, got {begin}; k would "
            "never change"
        )
    return begin + max(1, (iterations - begin) // 2)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Read a layer list such as ``0-9``, ``0,2,5``, ``all``, ``all,-2`` or ``none``.

    Args:
        text: comma-separated layer numbers and inclusive ranges, counted from 0. ``all,-N`` is
            every layer but the last N.
        num_layers: number of transformer layers in the whole model.

    Returns:
        Sorted layer numbers.

    Raises:
        ConfigError: if the text is not a layer list, a layer is out of range or listed twice, or
            the list is empty without saying ``none``.
    """
    text = text.replace(" ", "")
    if text == "none":
        return ()
    if match := re.fullmatch(r"all(?:,-(\d+))?", text):
        dropped = int(match[1] or 0)
        if dropped >= num_layers:
            raise ConfigError(
                f"--topk-layers {text} leaves no TopK layer in a model of {num_layers} layers; "
                "list the layers, or give none for the dense model"
            )
        return tuple(range(num_layers - dropped))
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError(
                f"--topk-layers takes numbers and ranges such as 0-9 or 0,2,5, or all, all,-2 or "
                f"none, got {part!r} in {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"--topk-layers: the range {part} runs backwards")
        # The check precedes the range, so that 0-99999999999 does not fill the memory.
        _check_layers((first, last) if last > first else (first,), num_layers)
        layers.extend(range(first, last + 1))
    return _check_layers(tuple(sorted(layers)), num_layers)


def _check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"--topk-layers: layer {layer} is out of range; this model's layers are "
                f"0 to {num_layers - 1}"
            )
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ConfigError(f"--topk-layers: layer {twice[0]} is listed twice; list each layer once")
    return layers


def _check_k(name: str, k: int, hidden_size: int, flag: str) -> None:
    if not 1 <= k <= hidden_size:
        change = "raise" if k < 1 else "lower"
        raise ConfigError(
            f"{name} must be in [1, hidden_size={hidden_size}], got {k}; {change} {flag}"
        )

"""Puts sparse transport, sparse saving and the check of settings into Megatron's training loop.

`pretrain()` accepts a P2PCommunicator, but one is made from a pipeline group, and the groups are
made inside `pretrain()`. Megatron asks for its schedule (`get_forward_backward_func`) after that,
on every rank, once before training and in every evaluation: there the communicator is added to the
schedule's arguments, with the process groups that the schedule would choose itself.
"""

import functools
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import get_args, print_rank_last

from topk_megatron.config import k_at
from topk_megatron.errors import ConfigError
from topk_megatron.model.layer import global_layer_number
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.parallel.pipeline import SparseP2PCommunicator
from topk_megatron.parallel.saved import SparseSaver
from topk_megatron.parallel.verify import Verifier
from topk_megatron.train.step import current_iteration

# Beside the settings of the model, what both sides of a message must agree on.
_FLAGS = ("topk_sparse_p2p", "topk_verify")


class ParallelFeatures:
    """What a rank holds for sparse transport and sparse saving."""

    def __init__(self, args: Namespace, runtime: TopKRuntime) -> None:
        self.runtime = runtime
        self.verifier = Verifier(args.topk_verify)
        self.sends_sparsely: bool = args.topk_sparse_p2p
        self.communicator: SparseP2PCommunicator | None = None
        self._checked = self._prepared = False
        runtime.keeps_selection = self.sends_sparsely
        if args.topk_sparse_save:
            runtime.saver = SparseSaver(self.verifier)

    def check_once(self) -> None:
        """Compare the settings of all ranks, the first time."""
        if not self._checked:
            settings: Any = get_args()
            check_same_settings(settings)
            self._checked = True

    def schedule(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step of Megatron's schedule with what this run adds to it."""
        settings: Any = get_args()
        model, forward_only = kwargs["model"], bool(kwargs.get("forward_only"))
        self._prepare(model if isinstance(model, list) else [model])
        iteration = current_iteration(settings)
        self.verifier.begin(iteration)
        if self.communicator is not None:
            k = k_at(self.runtime.config, iteration)
            self.communicator.begin(k, kwargs["num_microbatches"], forward_only=forward_only)
            kwargs["p2p_communicator"] = self.communicator
            if kwargs.get("pg_collection") is None:
                kwargs["pg_collection"] = _default_groups()
        result = stock(*args, **kwargs)
        if self.verifier.active and not forward_only:
            self._report(iteration)
        return result

    def _prepare(self, model: list[Any]) -> None:
        if self._prepared:
            return
        self._prepared = True
        if self.sends_sparsely:
            group: Any = mpu.get_pipeline_model_parallel_group()
            self.communicator = SparseP2PCommunicator(
                group,
                get_model_config(model[0]),
                hidden_size=self.runtime.config.hidden_size,
                sparse_out=[self._ends_in_topk(chunk) for chunk in model],
                verifier=self.verifier,
            )
        if self.runtime.saver is not None:
            for chunk in model:
                _save_sparsely(get_attr_wrapped_model(chunk, "decoder"), self.runtime)
                if get_attr_wrapped_model(chunk, "pre_process"):
                    embedding = get_attr_wrapped_model(chunk, "embedding")
                    _look_up_again(embedding, self.runtime.saver)

    def _ends_in_topk(self, chunk: Any) -> bool:
        """Whether what this chunk sends is a TopK's output, as it left the layer.

        The model's last layer is followed by the final norm, on whatever stage that is.
        """
        layers = get_attr_wrapped_model(chunk, "decoder").layers
        if not len(layers):
            return False
        config, number = self.runtime.config, global_layer_number(layers[-1])
        return number in config.residual_layers and number != config.num_layers - 1

    def _report(self, iteration: int) -> None:
        counts = self.verifier.take_counts()
        device = torch.cuda.current_device()
        total = torch.tensor(list(counts.values()), dtype=torch.int64, device=device)
        dist.all_reduce(total)
        text = ", ".join(f"{n} {kind}" for n, kind in zip(total.tolist(), counts, strict=True))
        print_rank_last(f" topk verify {iteration + 1:8d} | bitwise equal on all ranks: {text} |")


def _default_groups() -> Any:
    from megatron.core.pipeline_parallel import schedules

    return schedules._build_default_pg_collection()


def _save_sparsely(decoder: Any, runtime: TopKRuntime) -> None:
    """Let the saver work while the layers of a model chunk run."""
    saver: Any = runtime.saver

    def enter(module: Any, _: Any) -> None:
        if module.training:
            saver.enter(module.input_tensor)

    def leave(*_: Any) -> None:
        saver.leave()

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave, always_call=True)


def _look_up_again(embedding: Any, saver: SparseSaver) -> None:
    """Let the saver keep token ids in place of the embedding's output.

    Dropout would draw other numbers the second time, so that the output is kept with it.
    """

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module.training and module.embedding_dropout.p == 0:
            lookup = functools.partial(module.forward, *args, **kwargs)
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            saver.remember_embedding(output, lookup, sum(x.nbytes for x in inputs))

    embedding.register_forward_hook(remember, with_kwargs=True)


def check_same_settings(args: Namespace) -> None:
    """Compare the TopK settings of all ranks; every rank must call it.

    Raises:
        ConfigError: on every rank, with the setting and two ranks that differ in it.
    """
    mine = {**args.topk, **{name: getattr(args, name) for name in _FLAGS}}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, settings in enumerate(everyone):
        for name, value in everyone[0].items():
            if settings[name] != value:
                raise ConfigError(
                    f"ranks were started with different TopK settings: {name} is {value} on rank "
                    f"0 and {settings[name]} on rank {rank}; give every rank the same flags"
                )


def install_parallel(args: Namespace, runtime: TopKRuntime) -> None:
    """Wrap the schedule that Megatron's loop asks for (megatron-core 0.19)."""
    from megatron.training import training

    features = ParallelFeatures(args, runtime)
    module: Any = training
    original = module.get_forward_backward_func

    @functools.wraps(original)
    def get_forward_backward_func(*positional: Any, **keywords: Any) -> Any:
        features.check_once()
        stock = original(*positional, **keywords)
        return functools.partial(features.schedule, stock)

    module.get_forward_backward_func = get_forward_backward_func

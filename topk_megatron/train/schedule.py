"""Opens every step of Megatron's schedule: the one place that sets the k of a step.

Opening a step sets k, decides whether statistics and verification run, and passes the communicator
of the sparse transport to the schedule, together with the process groups that the schedule would
choose itself. All other code only reads k: layers and metrics from `TopKRuntime.k`, the transport
from the arguments of its `begin`.
"""

import functools
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import get_args, print_rank_last

from topk_megatron.errors import ConfigError
from topk_megatron.model.layer import global_layer_number
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.parallel.pipeline import SparseP2PCommunicator
from topk_megatron.parallel.saved import SparseSaver
from topk_megatron.parallel.verify import Verifier
from topk_megatron.train.bypass import check_applied

# Flags on which both sides of a message must agree, in addition to the model's settings.
_FLAGS = ("topk_sparse_p2p", "topk_verify")


class StepRunner:
    """Runs the steps of one rank, with sparse transport and sparse saving if they are on.

    Attributes:
        runtime: the TopK layers of this rank.
        verifier: compares sparse forms with dense ones in verified steps.
        sends_sparsely: whether pipeline stages exchange sparse messages.
        saver: packs saved activations; None keeps them dense.
        communicator: sends sparse messages; None before the first step or without sparse transport.
    """

    def __init__(self, args: Namespace, runtime: TopKRuntime) -> None:
        """Set up verification and saving; the communicator is built in the first step.

        Args:
            args: Megatron's arguments, with the ``--topk-…`` flags.
            runtime: the TopK layers of this rank.
        """
        self.runtime = runtime
        self.verifier = Verifier(args.topk_verify)
        self.sends_sparsely: bool = args.topk_sparse_p2p
        saves = args.topk_sparse_save
        self.saver = SparseSaver(runtime.selections, self.verifier) if saves else None
        self.communicator: SparseP2PCommunicator | None = None
        self._prepared = False
        self._unchecked = {"training", "evaluation"}

    def run_step(self, schedule: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one training or evaluation step of Megatron's schedule."""
        settings: Any = get_args()
        model, forward_only = kwargs["model"], bool(kwargs.get("forward_only"))
        self._prepare(settings, model if isinstance(model, list) else [model])
        iteration = current_iteration(settings)
        logged = (iteration + 1) % settings.log_interval == 0
        self.runtime.begin_step(iteration, measuring=logged and not forward_only)
        self.verifier.begin(iteration)
        if self.communicator is not None:
            k, count = self.runtime.k, kwargs["num_microbatches"]
            self.communicator.begin(k, count, forward_only=forward_only)
            kwargs["p2p_communicator"] = self.communicator
            if kwargs.get("pg_collection") is None:
                kwargs["pg_collection"] = _default_groups()
        result = schedule(*args, **kwargs)
        self._check_applied("evaluation" if forward_only else "training")
        if self.verifier.active and not forward_only:
            self._report(iteration)
        return result

    def _prepare(self, args: Namespace, model: list[Any]) -> None:
        """In the first step, compare the ranks' settings and set up the sparse forms."""
        if self._prepared:
            return
        self._prepared = True
        check_same_settings(args)
        if self.sends_sparsely:
            group: Any = mpu.get_pipeline_model_parallel_group()
            self.communicator = SparseP2PCommunicator(
                group,
                get_model_config(model[0]),
                hidden_size=self.runtime.config.hidden_size,
                sparse_out=[self._ends_in_topk(chunk) for chunk in model],
                selections=self.runtime.selections,
                verifier=self.verifier,
            )
        if self.saver is not None:
            for chunk in model:
                _save_sparsely(get_attr_wrapped_model(chunk, "decoder"), self.saver)
                if get_attr_wrapped_model(chunk, "pre_process"):
                    _look_up_again(get_attr_wrapped_model(chunk, "embedding"), self.saver)

    def _check_applied(self, kind: str) -> None:
        """After the first step, and after an evaluation before it, check that each TopK ran."""
        if kind in self._unchecked:
            training = kind == "training"
            check_applied(self.runtime, training=training, when=f"the first {kind} step")
            # Replaying a CUDA graph, as evaluation does after training, calls no layer.
            self._unchecked -= {"training", "evaluation"} if training else {"evaluation"}

    def _ends_in_topk(self, chunk: Any) -> bool:
        """Return whether this chunk sends the unchanged output of a TopK.

        The final norm follows the model's last layer, on whichever stage that is.
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


def current_iteration(args: Namespace) -> int:
    """Return the number of the current step, counted from 0.

    `args.iteration` is where this run began. An evaluation before the first step (a finished run
    loaded again, --skip-train) must use the k of the last step, not of step 0.
    """
    return max(getattr(args, "curr_iteration", 0), args.iteration - 1, 0)


def _default_groups() -> Any:
    from megatron.core.pipeline_parallel import schedules

    return schedules._build_default_pg_collection()


def _save_sparsely(decoder: Any, saver: SparseSaver) -> None:
    """Make the saver pack while the layers of a model chunk run."""

    def enter(module: Any, _: Any) -> None:
        if module.training:
            saver.enter(module.input_tensor)

    def leave(*_: Any) -> None:
        saver.leave()

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave, always_call=True)


def _look_up_again(embedding: Any, saver: SparseSaver) -> None:
    """Make the saver keep token ids in place of the embedding's output.

    Dropout would draw different numbers the second time, so with dropout the output is kept.
    """

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module.training and module.embedding_dropout.p == 0:
            lookup = functools.partial(module.forward, *args, **kwargs)
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            saver.remember_embedding(output, lookup, sum(x.nbytes for x in inputs))

    embedding.register_forward_hook(remember, with_kwargs=True)


def check_same_settings(args: Namespace) -> None:
    """Compare the TopK settings of all ranks; every rank must call this.

    Raises:
        ConfigError: on every rank; names the setting and two ranks that differ in it.
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

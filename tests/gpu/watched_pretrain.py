"""Pretrains and prints, for each TopK output, its dtype and how many neurons survive.

This is an entry for `tests.harness.launch.pretrain`.
"""

from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


@exit_on_user_error
def main() -> None:
    """Train, and print each TopK output's dtype and survivors."""
    device = prepare_device()
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.train.main import run

    apply = TopKRuntime.apply

    def watched(self: Any, hidden_states: Any, layer: int, *, training: bool) -> Any:
        output = apply(self, hidden_states, layer, training=training)
        most = int((output != 0).sum(-1).max())
        print(f"WATCHED layer {layer} {output.dtype} at most {most}", flush=True)
        return output

    TopKRuntime.apply = watched
    run(device)


if __name__ == "__main__":
    main()

"""Pretrain a TopK language model (or its dense twin) with Megatron-Core.

    torchrun --nproc-per-node 2 pretrain_topk_gpt.py --topk-k 32 --topk-layers all,-2 …

The script takes every flag of Megatron's own GPT pretraining, plus the ``--topk-…`` group. On a
machine without CUDA the same command runs on the CPU; with one, every rank needs a GPU.
"""

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device
from topk_megatron.train.main import run


@exit_on_user_error
def main() -> None:
    """Choose the device before Megatron is imported, then train."""
    run(prepare_device())


if __name__ == "__main__":
    main()

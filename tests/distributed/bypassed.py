"""Runs a script, by default pretraining, in which Megatron is led past the TopK of some layers.

An entry for `tests.harness.launch.pretrain`. TOPK_BYPASS names sites, such as ``residual:2,MLP:0``,
whose layers lose their hook once they are built, as another way through the layer would do.
TOPK_SCRIPT is the script, relative to the repository.
"""

import os
import runpy
from typing import Any

from tests.harness.launch import REPOSITORY, SCRIPT
from topk_megatron.compat import prepare_device


def main() -> None:
    """Run the script without the TopK of the chosen sites."""
    prepare_device()
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    from topk_megatron.model.layer import TopKLayerMixin

    sites = [site.split(":") for site in os.environ["TOPK_BYPASS"].split(",")]
    build = TopKLayerMixin.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if ["residual", str(self.topk_layer)] in sites:
            self.mlp_bda = get_bias_dropout_add
        if ["MLP", str(self.topk_layer)] in sites:
            self.mlp.linear_fc2._forward_pre_hooks.clear()

    TopKLayerMixin.__init__ = __init__
    script = os.environ.get("TOPK_SCRIPT", SCRIPT)
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


if __name__ == "__main__":
    main()

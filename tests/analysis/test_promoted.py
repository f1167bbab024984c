"""Promoted tokens against the logits of a lone neuron."""

import pytest
import torch

from topk_megatron.analysis.promoted import OutputDirections


@pytest.mark.parametrize("centred", [False, True])
def test_promoted_tokens_are_those_whose_logits_the_lone_neuron_raises_most(centred: bool) -> None:
    torch.manual_seed(0)
    head, norm = torch.randn(40, 12), torch.rand(12) + 0.5
    state = torch.zeros(12)
    state[5] = 3.0
    kind = torch.nn.LayerNorm(12) if centred else torch.nn.RMSNorm(12)
    with torch.no_grad():
        kind.weight.copy_(norm)
        logits = head @ kind(state)
    promoted, suppressed = OutputDirections(head, norm, centred).top(5, 6, 4)
    assert [token for token, _ in promoted[0]] == logits.topk(4).indices.tolist()
    assert [token for token, _ in suppressed[0]] == logits.topk(4, largest=False).indices.tolist()

"""The rungs of the ladder: one dial, the depth, decides every size and the length of training.

The residual stream is wide, and heads and MLPs are narrow: with a quarter of the usual channels in
attention and of the usual units in the MLP, twice the width has the same number of parameters in
the layers. At these sizes that is better for dense models too (docs/design/0013-tax.md).
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

# Fractions of the training after which a branch cools down, for the loss at fewer tokens.
BRANCHES = (0.25, 0.5)
COOLDOWN = 0.2  # share of a training, or of a branch's, over which the learning rate falls to 0
SEQUENCE = 256  # tokens
VOCABULARY = 4096  # pieces
HEAD = 16  # channels of an attention head
_STEPS_MULTIPLE = 40  # so that every branch point falls on a whole step


@dataclass(frozen=True)
class Rung:
    """The sizes of the models of one depth.

    Attributes:
        depth: Number of layers, the dial.
        batch: Sequences a step.
        ratio: Training tokens for each of `parameters`.
    """

    depth: int
    batch: int = 16
    ratio: int = 20

    @property
    def hidden(self) -> int:
        """Hidden size H."""
        return 32 * self.depth

    @property
    def heads(self) -> int:
        """Attention heads: their channels together are H / 4."""
        return self.hidden // 4 // HEAD

    @property
    def ffn(self) -> int:
        """Units of the gated MLP, about 2/3 H."""
        return round(self.hidden * 2 / 3 / 8) * 8

    @property
    def parameters(self) -> int:
        """Parameters of the layers' matrices, which leaves out embedding and norms."""
        return self.depth * self.hidden * (4 * self.heads * HEAD + 3 * self.ffn)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token: 6 for each weight of a matrix.

        The output embedding counts, the input embedding and the norms do not. Attention adds 6
        for each layer, channel and token seen, of which there are S / 2 on average, twice: once
        for the scores and once for the values.
        """
        attention = 6 * self.depth * self.heads * HEAD * SEQUENCE
        return 6 * (self.parameters + VOCABULARY * self.hidden) + attention

    @property
    def steps(self) -> int:
        """Training steps."""
        tokens = self.ratio * self.parameters
        return round(tokens / (self.batch * SEQUENCE) / _STEPS_MULTIPLE) * _STEPS_MULTIPLE

    def tokens(self, fraction: float = 1.0) -> int:
        """Training tokens of a branch, or of the whole."""
        return round(self.steps * fraction) * self.batch * SEQUENCE

    def flags(self) -> list[str]:
        """Return the flags of pretraining that follow from the depth."""
        sizes = {
            "--num-layers": self.depth,
            "--hidden-size": self.hidden,
            "--ffn-hidden-size": self.ffn,
            "--num-attention-heads": self.heads,
            "--kv-channels": HEAD,
            "--seq-length": SEQUENCE,
            "--max-position-embeddings": SEQUENCE,
            "--micro-batch-size": self.batch,
            "--global-batch-size": self.batch,
        }
        return [str(word) for item in sizes.items() for word in item]

    def fill_in(self, text: str) -> str:
        """Replace ``{expression}`` by its value, rounded to a whole number.

        An expression is made of numbers, +, -, *, /, and the names H (hidden size), D (depth) and
        S (training steps).

        Raises:
            ValueError: If it contains anything else.
        """
        names = {"H": self.hidden, "D": self.depth, "S": self.steps}
        return re.sub(r"\{([^}]*)\}", lambda found: str(_evaluate(found.group(1), names)), text)


# On one core of a laptop a run of depth 4 takes 4 minutes, of depth 6 half an hour, of depth 8 two
# hours, and those of depths 10 and 12 take 6 and 8. The last sees 10 tokens for each parameter,
# because two cores do not allow more.
RUNGS = {
    rung.depth: rung
    for rung in (Rung(4), Rung(6), Rung(8), Rung(10, batch=32), Rung(12, batch=32, ratio=10))
}

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluate(expression: str, names: dict[str, int]) -> int:
    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"expected numbers, + - * / and {', '.join(names)}, got {{{expression}}}")

    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        raise ValueError(f"cannot read {{{expression}}} as an expression") from None
    return round(value(tree.body))

"""How a hidden state carries its selection from the layer that made it to who sends or saves it."""

# Attribute of a stage's output, or of what a stage received: the TopK's int32 bitmask.
SELECTION = "topk_selection"

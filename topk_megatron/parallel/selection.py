"""How a hidden state carries its selection from who made it to who sends or saves it."""

# Attribute of a stage's output: the TopK's int32 bitmask [..., W].
SELECTION = "topk_selection"
# Attribute of what a stage received sparsely: the kept indices [N, K].
INDICES = "topk_indices"

"""Writing sequences with a model: how the next token is chosen, and the loop that chooses it.

samplers   temperature, top-k, top-p, min-p, greedy: pure functions of logits
decode     one loop with a cache around any next-token model
"""

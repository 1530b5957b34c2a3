"""Writing sequences with a model: how the next token is chosen, and the loops that choose it.

samplers     repetition penalty, temperature, top-k, top-p, min-p, greedy: pure functions of logits
decode       prompts of any lengths continued in one compiled loop, up to stops and limits
stream       the same tokens as they come
beam         the best texts that beam search finds
speculative  a draft model proposes, the target checks: its distribution, in fewer calls
guidance     towards a condition and away from none; within a part of the vocabulary
stops        tokens and sequences of tokens that end a text
loop         what the model and its cache must be, and the step that the loops share
"""

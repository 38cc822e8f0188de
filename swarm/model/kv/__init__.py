"""A KV cache that overflows gracefully, on transformers' cache classes: `kv_cache` makes one, `use_kv` sets a default.

Attention, masks and `generate` stay transformers' own. The cache hands each attention layer its whole keys and values,
as transformers' `DynamicCache` does, in the same shape, order and layout in memory, so results are equal bit for bit in
the lossless modes. What differs is where they lie meanwhile: one or two layers at a time in working memory, the newest
tokens of every layer beside them, and everything older in blocks that go down to host memory and to a file on disk,
oldest first, each tier with a budget of bytes.

    options     what a user chooses, and the defaults taken from the machine
    layout      how keys and values lie in a buffer
    codecs      what a stored block holds: the same bytes, or eight bits for each number
    plan        how a budget is divided, and what spills next: pure functions
    memory      buffers counted against a budget
    scratch     the file without a name that disk blocks are in
    blocks      which block is in which tier
    workspace   the layers that attention sees, and the thread that fetches the next one
    engine      one token's way through all of these
    cache       the transformers cache
    fidelity    what an approximate mode changes in the logits
    default     a model whose `generate` uses such a cache
"""

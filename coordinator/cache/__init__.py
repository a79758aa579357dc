"""The cache of answers: keys, what may stand in for what, and the table. Pure, but for ``service``; why it may be trusted is in
specs/inference-cache.md."""

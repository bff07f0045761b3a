"""Beyond the paper's HyperLlama: a chapter each. The core knows none of them.

A chapter reaches in by two hooks. `compression(args)` returns a gist.Compression: other rows to read,
other places, another prefix. `terms(run, terms)` returns the loss's list of terms (data.Term), changed.
OPTIONS are its own; check(args) raises InputError for what they don't go with. What a chapter doesn't need,
it leaves out.
"""

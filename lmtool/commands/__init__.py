"""Words into calls: each command is a typed signature and one call.

Options are described once, in the signature or as a shared alias in `options`; the work, and the import of whatever
does it, is inside the function. Knows no rendering, no sampling and no tensors.
"""

"""Files, names, slices: what is stored in a checkpoint and how to get it out.

Does not know nn.Module, model families (beyond the names that GGUF gives its tensors) or the engine.
"""

"""One decoder; a family is its difference: how its config is read, how its tensors are named."""

"""Every op as a Triton kernel, same names and signatures as the reference. Importing asks no driver.

A kernel `_x_kernel` stands above its launcher `x`. Programmatic dependent launch (Hopper): a kernel may start while the
one before it still runs, so *before* `wait_for_previous` it may read only what no kernel ever writes (weights).
"""

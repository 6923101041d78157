"""Every op as a Triton kernel, same names and signatures as the reference. Importing asks no driver.

A kernel `_x_kernel` stands above its launcher `x`. Programmatic dependent launch (Hopper): a kernel may start while the
one before it still runs, so *before* `wait_for_previous` it may read only what no kernel ever writes (weights).
"""

import os

# a product and the sum behind it are one instruction: Triton 3.9 warns where nobody has said so, 3.10 is to end it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

"""Pictures for `pipeline`: `from lmtool.vl import load_image`, as in LMDeploy's tutorials."""

from lmtool.images.load import encode_image_base64, load_image

__all__ = ["encode_image_base64", "load_image"]

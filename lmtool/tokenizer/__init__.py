"""Text to ids and back, and conversations to prompts: from HF files, sentencepiece and tiktoken models or a GGUF.

Does not know the engine or HTTP. Remote code of a checkpoint is never run.
"""

from lmtool.tokenizer.load import load_tokenizer
from lmtool.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]

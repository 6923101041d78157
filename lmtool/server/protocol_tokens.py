"""The bodies of `/tokenize` and `/detokenize`, as vLLM has them, and of `/v1/encode`, as LMDeploy 0.3 had it."""

from pydantic import model_validator

from lmtool.server.protocol import Id, Many, Strict
from lmtool.server.protocol_chat import Message, Scalar


class TokenizeRequest(Strict):
    """A prompt, or messages. add_special_tokens: the tokenizer's beginning; None: for a prompt only, because a
    conversation's template writes its own."""

    model: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Scalar] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("leave out add_special_tokens: a conversation's template writes its own")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Many[Id]


class EncodeRequest(Strict):
    """do_preprocess: the text is a user's message, told to the chat template. add_bos: the tokenizer's beginning. model
    is not LMDeploy's: a proxy needs it."""

    model: str | None = None
    input: str | Many[str]
    do_preprocess: bool = False
    add_bos: bool = True

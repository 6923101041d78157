"""The body of `/v1/chat/interactive`, with the names and defaults that LMDeploy 0.3 gave it."""

from typing import Annotated

from pydantic import Field

from lmtool.server.protocol import Many, Strict
from lmtool.server.protocol_chat import Message


class InteractiveRequest(Strict):
    """One turn: ``prompt`` holds only what is new.

    session_id         -1: no session, nothing is remembered
    interactive_mode   the session goes on after this turn; false ends it, and an empty prompt then only ends it
    cancel             end the turn that this session has under way, and answer nothing
    request_output_len null: up to the end of the context
    image_url          pictures for a prompt that is a text: data URLs, or as in chat
    model, seed        not LMDeploy's
    """

    model: str | None = None
    prompt: str | Many[Message] = ""
    session_id: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    interactive_mode: bool = False
    stream: bool = False
    cancel: bool = False
    stop: str | Many[str] | None = None
    request_output_len: Annotated[int, Field(ge=1, lt=2**31)] | None = 512
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 40
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.8
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    image_url: str | Annotated[Many[str], Field(min_length=1)] | None = None
    # of other kinds of models, and always absent
    adapter_name: None = None

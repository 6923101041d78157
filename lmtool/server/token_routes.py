"""`/tokenize` and `/detokenize`, as vLLM has them, `/v1/encode`, as LMDeploy 0.3 had it. No engine is asked."""

from fastapi import APIRouter, Response

from lmtool.errors import InputError
from lmtool.images.prepared import IMAGE_ID
from lmtool.server.chat_prompt import chat_prompt, plain_messages
from lmtool.server.context import ServerContext
from lmtool.server.documents import Detokenized, Encoded, Tokenized, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.json_body import json_route
from lmtool.server.protocol_tokens import DetokenizeRequest, EncodeRequest, TokenizeRequest
from lmtool.server.refusals import json_response
from lmtool.server.template_options import template_options
from lmtool.server.translate import check_model, check_places, off_the_loop
from lmtool.tokenizer import Tokenizer


def token_router(context: ServerContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["tokens"])
    tokenizer = context.tokenizer

    @router.post("/tokenize", responses=answers_documented(Tokenized))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt or of a conversation."""
        check_model(context, body.model)
        ids = await _ids(context, body)
        texts = None
        if body.return_token_strs:
            texts = await off_the_loop(len(ids), lambda: ["" if i < 0 else tokenizer.token_text(i) for i in ids])
        length = context.info.session_len
        return json_response({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts})

    @router.post("/detokenize", responses=answers_documented(Detokenized))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special ones included."""
        check_model(context, body.model)
        _check_ids(body.tokens, context.info.vocab_size)
        text = await off_the_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special=False))
        return json_response({"prompt": text})

    @router.post("/v1/encode", responses=answers_documented(Encoded))
    async def encode(body: EncodeRequest) -> Response:
        """Token ids of a text, or of several."""
        check_model(context, body.model)
        if isinstance(body.input, str):
            ids = await _encoded(tokenizer, body.input, body)
            return json_response({"input_ids": ids, "length": len(ids)})
        several = [await _encoded(tokenizer, text, body) for text in body.input]
        return json_response({"input_ids": several, "length": [len(ids) for ids in several]})

    return router


async def _ids(context: ServerContext, body: TokenizeRequest) -> list[int]:
    """An `IMAGE_ID` for each row of a picture."""
    tokenizer = context.tokenizer
    if body.messages is None:
        text = body.prompt or ""
        return await _text_ids(tokenizer, text, "prompt", add_special=body.add_special_tokens is not False)
    options = template_options(tokenizer, body.chat_template_kwargs, None)
    with_prompt = body.add_generation_prompt
    plain = plain_messages(body.messages, tokenizer)
    images = await context.pictures.of(body.messages)
    ids = (await chat_prompt(tokenizer, plain, options, add_generation_prompt=with_prompt)).ids
    check_places(ids, images, "messages")
    rows = (image.num_tokens for image in images)
    return [one for token_id in ids for one in ([token_id] * next(rows) if token_id == IMAGE_ID else [token_id])]


async def _encoded(tokenizer: Tokenizer, text: str, body: EncodeRequest) -> list[int]:
    if body.do_preprocess:
        return (await chat_prompt(tokenizer, [{"role": "user", "content": text}], {})).ids
    return await _text_ids(tokenizer, text, "input", add_special=body.add_bos)


async def _text_ids(tokenizer: Tokenizer, text: str, param: str, *, add_special: bool) -> list[int]:
    """As `/v1/completions` reads a prompt."""
    try:
        return await off_the_loop(
            len(text), lambda: tokenizer.encode(text, add_special=add_special, parse_special=True)
        )
    except InputError as error:
        raise Refusal(400, error.cause, error.fix, param=param) from error


def _check_ids(ids: list[int], vocab_size: int) -> None:
    most = max(ids, default=0)
    if most >= vocab_size:
        raise Refusal(400, f"token id {most} is outside the vocabulary of {vocab_size}", param="tokens")

"""Pictures over HTTP, asked for by OpenAI's own client: a tiny LLaVA behind a real server, and its answers those of
`lmtool.pipeline` itself."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lmtool import pipeline
from lmtool.config import EngineConfig
from lmtool.images.prepared import PreparedImage
from lmtool.server.chat_prompt import plain_messages
from lmtool.server.picture_cache import PictureCache
from lmtool.server.protocol_chat import Message
from lmtool.server.tools_messages import conversation
from tests.server.pictures import BLUE, RED, WIDE, ask, data_url, picture, rows, same, says, text_of
from tests.server.serving import Serving
from tests.server.support import llava_engine
from tests.tiny_llava import tiny_llava


# ---------------------------------------------------------------------- answers
@pytest.mark.parametrize("urls", [(RED,), (RED, BLUE), (BLUE, RED), (WIDE, RED, BLUE, RED, WIDE)])
def test_an_answer_to_pictures_is_the_engines_own(seeing, pipe, llava_folder, urls):
    answer = ask(seeing, says("What is this?", *urls))
    assert text_of(answer) == same(pipe, says("What is this?", *urls))
    blind = ask(seeing, says("What is this?"))
    ids, _ = pipe.prepare([says("What is this?", *urls)])
    num_text = sum(token_id >= 0 for token_id in ids)
    assert answer.usage.prompt_tokens == num_text + sum(rows(llava_folder, url) for url in urls)
    assert answer.usage.prompt_tokens > blind.usage.prompt_tokens


def test_the_model_sees(seeing):
    """Another picture, another answer; the order counts."""
    found = {text_of(ask(seeing, says("What is this?", *urls))) for urls in ((RED,), (BLUE,), (RED, BLUE), (BLUE, RED))}
    assert len(found) == 4


def test_a_stream_is_the_same_text(seeing):
    chunks = list(ask(seeing, says("What is this?", RED), stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == text_of(ask(seeing, says("What is this?", RED)))


def test_the_same_picture_again_is_not_computed_again(seeing, llava_folder):
    question = says("Whose is it, and why?", data_url(picture(seed=11)))
    first, second = ask(seeing, question).usage, ask(seeing, question).usage
    assert first.prompt_tokens_details.cached_tokens < 64
    assert second.prompt_tokens == first.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens >= second.prompt_tokens - 64
    other = ask(seeing, says("Whose is it, and why?", data_url(picture(seed=12)))).usage
    assert other.prompt_tokens == first.prompt_tokens
    assert other.prompt_tokens_details.cached_tokens < 64  # no block with another picture's rows


def test_a_picture_in_a_later_turn_and_one_before_it(seeing, pipe):
    first = says("What is this?", data_url(picture(90, 90, seed=21)))
    said = {"role": "assistant", "content": text_of(ask(seeing, first))}
    second = says("And this?", BLUE)
    answer = ask(seeing, first, said, second)
    assert text_of(answer) == same(pipe, first, said, second)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 64  # the first turn's
    third = [first, said, second, {"role": "assistant", "content": text_of(answer)}, says("Both?")]
    assert text_of(ask(seeing, *third)) == same(pipe, *third)


def test_choices_share_the_pictures(seeing):
    def choices(**settings):
        answer = ask(seeing, says("Tell me of it.", RED, WIDE), n=3, temperature=1, **settings)
        return [choice.message.content for choice in answer.choices], answer.usage

    first, usage = choices(seed=5)
    assert len(set(first)) == 3
    assert choices(seed=5)[0] == first
    assert usage.prompt_tokens == ask(seeing, says("Tell me of it.", RED, WIDE)).usage.prompt_tokens  # counted once


def test_text_beside_pictures_in_one_batch(seeing, pipe):
    asked = [says(f"Tell me about {i}", *((RED, BLUE, WIDE)[: i % 4])) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda message: text_of(ask(seeing, message)), asked))
    assert found == [same(pipe, message) for message in asked]


def test_responses_take_pictures_and_go_on_from_them(seeing, pipe):
    client = seeing.openai().responses

    def create(text, *urls, **settings):
        content = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
        content.append({"type": "input_text", "text": text})
        message = {"role": "user", "content": content}
        return client.create(model="tiny", input=[message], temperature=0, max_output_tokens=12, **settings)

    first = create("What is this?", RED)
    said = {"role": "assistant", "content": first.output_text}
    assert first.output_text == same(pipe, says("What is this?", RED))
    second = create("And this?", BLUE, previous_response_id=first.id)
    assert second.output_text == same(pipe, says("What is this?", RED), said, says("And this?", BLUE))
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 64 * 64
    third = create("Both?", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_a_session_remembers_its_pictures(seeing, pipe):
    def turn(http, prompt, **more):
        body = {"prompt": prompt, "session_id": 7, "interactive_mode": True, "temperature": 0, "request_output_len": 12}
        answer = http.post("/v1/chat/interactive", json={**body, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with seeing.http() as http:
        first = turn(http, "What is this?", image_url=[RED])
        assert first["text"] == same(pipe, says("What is this?", RED))
        said = {"role": "assistant", "content": first["text"]}
        second = turn(http, [says("And this?", BLUE)])
        assert second["text"] == same(pipe, says("What is this?", RED), said, says("And this?", BLUE))
        assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
        third = turn(http, "So?", image_url=RED)
    assert third["history_tokens"] == second["history_tokens"] + second["input_tokens"] + second["tokens"]


def test_tokenize_counts_rows(seeing, llava_folder):
    usage = ask(seeing, says("What is this?", RED, WIDE)).usage
    with seeing.http() as http:
        body = {"messages": [says("What is this?", RED, WIDE)], "return_token_strs": True}
        found = http.post("/tokenize", json=body).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == usage.prompt_tokens
    assert found["tokens"].count(-1) == rows(llava_folder, RED) + rows(llava_folder, WIDE)


def test_what_is_told_of_pictures(seeing):
    with seeing.http() as http:
        assert http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]

        def count() -> tuple[float, float]:
            lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
            label = '{model_name="tiny"}'
            seconds = "lmtool:image_preparation_seconds_sum"
            return float(lines[f"lmtool:images_total{label}"]), float(lines[f"{seconds}{label}"])

        images, seconds = count()
        ask(seeing, says("What is this?", RED, BLUE, RED))
        assert count()[0] == images + 2  # equal ones are read once
        assert count()[1] > seconds


def test_a_large_picture_comes_through_and_holds_up_nobody(seeing):
    """A body of many megabytes, as large as pictures may be: meanwhile others are answered."""
    large = data_url(picture(20, 20) + b"\0" * 19_000_000)
    num_others = 0

    async def main() -> int:
        nonlocal num_others
        async with httpx.AsyncClient(base_url=seeing.url, timeout=120) as http:
            body = {"model": "tiny", "messages": [says("What is this?", large)], "max_tokens": 2}
            answer = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            while not answer.done():
                assert (await http.get("/version")).status_code == 200
                num_others += 1
            return (await answer).status_code

    assert asyncio.run(main()) == 200
    assert num_others > 2


def test_pictures_that_come_again_are_not_decoded_again():
    cache, decoded = PictureCache(max_bytes=3 * 12), []

    def prepare(data: bytes) -> PreparedImage:
        decoded.append(data)
        return PreparedImage(pixels=data * 12, num_tiles=1, tile_size=2, size=(2, 2), num_tokens=1, digest=data)

    for data in (b"a", b"b", b"a", b"c", b"a", b"d", b"a", b"b"):  # there is room for three
        assert cache.get(data, prepare).digest == data
    assert decoded == [b"a", b"b", b"c", b"d", b"b"]


def test_a_checkpoint_as_liuhaotian_has_them(tmp_path):
    """Its tokenizer has no token for pictures, and its llava_folder no template."""
    tiny_llava(tmp_path, anyres=False, original=True)
    engine = llava_engine(tmp_path)
    config = EngineConfig(device="cpu", dtype="float32", session_len=1024, cache_gb=0.05)
    with Serving(engine) as server, pipeline(str(tmp_path), config) as pipe:
        question = says("What are these, <image>?", RED, WIDE)
        assert text_of(ask(server, question)) == same(pipe, question)
        with server.http() as http:
            tokens = http.post("/tokenize", json={"messages": [question]}).json()["tokens"]
        assert tokens.count(-1) == 2 * rows(tmp_path, RED) == 32
    engine.close()


def test_a_result_of_a_tool_and_pictures_after_it(seeing):
    """The template knows no tools: the result becomes text before the pictures of the next message."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        says("Look."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
        says("And this?", RED),
    ]
    plain = conversation(
        plain_messages(list(map(Message.model_validate, messages)), seeing.context.tokenizer), seeing.context.tokenizer
    )
    assert plain[-1]["content"][0]["text"].startswith("<tool_response>\ndone")
    assert plain[-1]["content"][1:] == [{"type": "image"}, {"type": "text", "text": "And this?"}]
    assert ask(seeing, *messages).usage.prompt_tokens > ask(seeing, *messages[:-1]).usage.prompt_tokens

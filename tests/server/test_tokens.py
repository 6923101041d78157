"""`/tokenize`, `/detokenize` and `/v1/encode` say what the model reads."""

import pytest

from tests.server.support import smollm2_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


def post(serving, path: str, **body):
    with serving.http() as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokens_of_a_text_and_back(serving, tokenizer):
    text = "Hello <|im_end|> 🐳"
    found = post(serving, "/tokenize", prompt=text, return_token_strs=True)
    assert found["tokens"] == tokenizer.encode(text, parse_special=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert "<|im_end|>" in found["token_strs"]
    assert post(serving, "/detokenize", tokens=found["tokens"]) == {"prompt": text}


def test_tokens_of_a_conversation_are_what_a_chat_counts(serving, tokenizer):
    found = post(serving, "/tokenize", messages=HELLO)
    assert found["tokens"] == tokenizer.chat_ids(HELLO)
    answer = serving.openai().chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert answer.usage.prompt_tokens == found["count"]
    without = post(serving, "/tokenize", messages=HELLO, add_generation_prompt=False)
    assert without["tokens"] == tokenizer.chat_ids(HELLO, add_generation_prompt=False)


def test_a_long_text_is_read_too(serving, tokenizer):
    text = "All work and no play. " * 2000
    assert post(serving, "/tokenize", prompt=text)["tokens"] == tokenizer.encode(text)


def test_encode_as_lmdeploy_has_it(serving, tokenizer):
    ids = tokenizer.encode("Hello")
    assert post(serving, "/v1/encode", input="Hello") == {"input_ids": ids, "length": len(ids)}
    several = post(serving, "/v1/encode", input=["Hello", "a b"], add_bos=False)
    assert several["input_ids"] == [tokenizer.encode(text, add_special=False) for text in ("Hello", "a b")]
    assert several["length"] == [len(ids) for ids in several["input_ids"]]
    chat = post(serving, "/v1/encode", input="Hello", do_preprocess=True)
    assert chat["input_ids"] == tokenizer.chat_ids(HELLO)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "either prompt or messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "leave out add_special_tokens"),
        ("/tokenize", {"messages": []}, "empty"),
        ("/detokenize", {"tokens": [49152]}, "outside the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "at least 0"),
        ("/v1/encode", {"input": 5}, "give a text or a list"),
    ],
)
def test_what_is_refused(serving, path, body, said):
    with serving.http() as client:
        response = client.post(path, json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]

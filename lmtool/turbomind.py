"""LMDeploy's `TurboMind` names over lmtool's engine, for code written against its 0.1 to 0.3 releases. No logic.

>>> from lmtool import turbomind as tm
>>> model = tm.TurboMind.from_pretrained("smollm2-135m")
>>> ids = model.tokenizer.encode(model.model.get_prompt("What is the capital of France?"))
>>> for outputs in model.create_instance().stream_infer(session_id=0, input_ids=[ids]):
...     answer_ids, num_tokens = outputs[0]
>>> model.tokenizer.decode(answer_ids.tolist())
"""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.pipeline import Pipeline, pipeline
from lmtool.errors import RequestError


class ChatModel:
    """What LMDeploy calls the model: the chat template."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def get_prompt(self, prompt: str) -> str:
        """The text that the model is given for a first user turn."""
        return self._pipe.tokenizer.render_chat([{"role": "user", "content": prompt}])


class PromptTokenizer:
    """Text of `ChatModel.get_prompt`, special tokens included, to ids and back."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def encode(self, text: str) -> list[int]:
        return self._pipe.tokenizer.encode(text, add_special=False, parse_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self._pipe.tokenizer.decode(ids)


class Generator:
    """One user of the engine."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def stream_infer(
        self,
        session_id: int,
        input_ids: Sequence[Sequence[int]],
        request_output_len: int = 512,
        gen_config: GenerationConfig | None = None,
    ) -> Iterator[list[tuple[np.ndarray, int]]]:
        """Yield, after each token, ``[(ids of the whole answer so far, their number)]``.

        session_id  accepted for LMDeploy's signature: a conversation's K/V is found by its tokens, not by a number
        """
        if len(input_ids) != 1:
            raise RequestError(f"input_ids holds {len(input_ids)} prompts", "give one, or use lmtool.pipeline for more")
        config = gen_config or GenerationConfig(max_new_tokens=request_output_len)
        answer: list[int] = []
        for part in self._pipe.stream([self._pipe.request(input_ids[0], config)]):
            answer += part.token_ids
            yield [(np.array(answer, dtype=np.int64), len(answer))]


class TurboMind:
    """A loaded model; `create_instance` gives as many generators over the one engine as are wanted."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.model = ChatModel(pipe)
        self.tokenizer = PromptTokenizer(pipe)

    @classmethod
    def from_pretrained(
        cls, model: str, model_name: str | None = None, engine_config: EngineConfig | None = None
    ) -> Self:
        """As `lmtool.pipeline`; model_name picks a chat template by name where the checkpoint has none."""
        return cls(pipeline(model, engine_config, chat_template=model_name))

    def create_instance(self) -> Generator:
        return Generator(self._pipe)

    def close(self) -> None:
        self._pipe.close()

"""`lmtool bench curve`: what one server does with so many requests at once, for several lengths of prompts.

Each cell is a closed loop: N clients, each of which sends its next request when it has its answer, so that N requests
are there all the time. What `plan` needs of a replica is in these figures and nothing else.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from lmtool.bench import outputs
from lmtool.bench.limits import cpu_name, device_name
from lmtool.bench.online import OnlinePlan, Session, questions_of
from lmtool.bench.online_client import api_url, make_client
from lmtool.bench.online_figures import Outcome, spread
from lmtool.bench.report import Report, make_console, make_report, show
from lmtool.bench.workloads import Size, Workload
from lmtool.config import LOOPBACK
from lmtool.engine.device import choose_device
from lmtool.errors import ConfigError, LmtoolError

_VERSION_S = 5.0
_FEWEST = 24  # requests of a cell: of a client alone, too, there is to be a 99th percentile
_LEAST_ROUNDS = 3  # the first is not counted, and the last is not whole


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePlan:
    """What to measure. card: what the server runs on; None: what is here, where it runs here. Raises ConfigError."""

    url: str
    model: str | None = None
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    input_lens: tuple[int, ...] = (128,)
    output_len: int = 64
    rounds: int = 8
    num_clients: int = 1
    timeout_s: float = 600.0
    seed: int = 0
    card: str | None = None

    def __post_init__(self) -> None:
        for flag, values in (("--concurrency", self.concurrency), ("--input-lens", self.input_lens)):
            if min(values) < 1 or len(set(values)) < len(values):
                raise ConfigError(f"{flag} is {','.join(map(str, values))}", "give different numbers, 1 or more each")
        if 1 not in self.concurrency:
            raise ConfigError("--concurrency has no 1", "what an empty server does is where a plan begins: add it")
        if self.output_len < 2:
            raise ConfigError(f"--output-len is {self.output_len}", "give 2 or more")
        if self.rounds < _LEAST_ROUNDS:
            raise ConfigError(f"--rounds is {self.rounds}", f"give {_LEAST_ROUNDS} or more")
        self.cell(max(self.concurrency), 0)  # it says what is wrong with the rest

    def cell(self, concurrency: int, index: int) -> OnlinePlan:
        return OnlinePlan(
            url=self.url,
            model=self.model,
            max_concurrency=concurrency,
            num_clients=min(self.num_clients, concurrency),
            timeout_s=self.timeout_s,
            seed=self.seed if self.seed < 0 else self.seed * 1000 + index,  # prompts that no cell before has sent
        )


def workload(concurrency: int, input_len: int, output_len: int, rounds: int, seed: int) -> Workload:
    """Prompts of one length; answers of 1 … 2 · output_len - 1 tokens, each as likely, whose mean is output_len.

    Equal answers would end together and be followed by as many prompts at once, round after round.
    """
    count = max(_FEWEST, rounds * concurrency)
    lengths = np.linspace(1, 2 * output_len - 1, count).round().astype(int)
    np.random.default_rng(seed).shuffle(lengths)
    sizes = tuple(Size(input_len, int(length)) for length in lengths)
    return Workload(f"{concurrency} at once {input_len}/{output_len}", sizes)


def run_curve(plan: CurvePlan, *, api_key: str | None = None, json_file: str | None = None) -> Report:
    """A table on stdout (stderr where the JSON goes to stdout). What was measured is written whatever comes after it.

    Raises InputError where no server answers, LmtoolError where it did not answer every request.
    """
    outputs.check(json_file, None)
    notices, results, model, engine = make_console(stderr=True), [], plan.model, ""
    cells = [(concurrency, input_len) for input_len in plan.input_lens for concurrency in plan.concurrency]
    try:
        with notices.status("asking for the server's model") as status:
            engine = asyncio.run(_engine(plan.url))
            for i, (concurrency, input_len) in enumerate(cells):
                one, where = plan.cell(concurrency, i), f"cell {i + 1} of {len(cells)}"
                wanted = workload(concurrency, input_len, plan.output_len, plan.rounds, one.seed)
                run = Session(one, questions_of(wanted, one.seed))
                asyncio.run(run.run(api_key, partial(_say, status.update, f"{where}, {wanted.name}")))
                model = run.model
                results.append(steady(wanted.name, run.outcomes, concurrency))
    finally:
        report = dataclasses.replace(
            make_report(str(model), "", None, asdict(plan)), engine=engine, device=_card(plan), results=results
        )
        if results:
            outputs.write(report, json_file, None)
            show(report, notices if json_file == "-" else make_console())
    return report


def _say(update: Callable[[str], None], where: str, line: str) -> None:
    update(f"{where}: {line}")


async def _engine(url: str) -> str:
    """Which server it is, with its version where it tells one as lmtool and vLLM do."""
    async with make_client(None) as client:
        try:
            answer = await client.get(api_url(url).removesuffix("/v1") + "/version", timeout=_VERSION_S)
            found = answer.json()["version"] if answer.status_code == 200 else ""
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            found = ""
    return f"server at {url}" + (f", version {found}" if found else "")


def _card(plan: CurvePlan) -> str:
    if plan.card is not None:
        return plan.card
    if urlsplit(plan.url).hostname not in LOOPBACK:
        return ""
    device = choose_device("auto")
    return device_name(device) if device.type == "cuda" else cpu_name()


# ---------------------------------------------------------------------- the middle of a run
def steady(name: str, outcomes: Sequence[Outcome], concurrency: int) -> dict[str, Any]:
    """A result of a report: of the time in which ``concurrency`` requests were there, and had not all begun at once.

    From when so many requests have ended until the last one is sent. requests_per_s is of tokens over the mean answer:
    requests that lie in that time in part count in part. Raises LmtoolError where a request failed, or its tokens
    were not counted.
    """
    failures = [one.failure for one in outcomes if one.failure is not None]
    if failures:
        raise LmtoolError(
            f"{name}: {len(failures)} of {len(outcomes)} requests failed: {failures[0]}",
            "lower --concurrency, or raise --timeout or the server's --max-queue",
        )
    prompts = [one.num_prompt_tokens for one in outcomes if one.num_prompt_tokens is not None]
    if len(prompts) < len(outcomes):
        raise LmtoolError(f"{name}: the server counts no tokens (usage)", "measure one that does, as lmtool's")
    begin_s = sorted(one.text_s[-1] for one in outcomes)[concurrency - 1]
    end_s = max(one.sent_s for one in outcomes)
    if not begin_s < end_s:
        raise LmtoolError(f"{name}: the requests ended before there were {concurrency} at once", "raise --rounds")
    inside = [one for one in outcomes if begin_s <= one.sent_s <= end_s]
    gaps = [
        later - earlier
        for one in outcomes
        for earlier, later in zip(one.text_s, one.text_s[1:], strict=False)
        if begin_s < later <= end_s
    ]
    num_tokens = sum(_tokens_between(one, begin_s, end_s) for one in outcomes)
    output_len = float(np.mean([one.num_output_tokens for one in outcomes]))
    output_tokens_per_s = num_tokens / (end_s - begin_s)
    return {
        "name": name,
        "concurrency": concurrency,
        "input_len": float(np.mean(prompts)),
        "output_len": output_len,
        "num_requests": len(outcomes),
        "duration_s": end_s - begin_s,
        "metrics": {
            "requests_per_s": {"median": output_tokens_per_s / output_len},
            "output_tokens_per_s": {"median": output_tokens_per_s},
            "time_to_first_token_s": spread([one.time_to_first_token_s for one in inside]),
            "inter_token_latency_s": spread(gaps),
        },
    }


def _tokens_between(one: Outcome, begin_s: float, end_s: float) -> float:
    """A piece of text may hold several tokens: each counts as many as the others of its answer."""
    pieces = sum(begin_s < came_s <= end_s for came_s in one.text_s)
    return pieces * one.num_output_tokens / len(one.text_s)

"""`lmtool bench online`: a workload sent to a server, ours or a peer's, over HTTP; the figures of its answers.

Runs outside the server's process. Knows no engine.
"""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lmtool.bench import outputs, workloads
from lmtool.bench.online_client import Question, Server, api_url, first_model, make_client
from lmtool.bench.online_figures import Outcome, result
from lmtool.bench.online_worker import Share, send_all
from lmtool.bench.report import Report, make_console, make_report, show
from lmtool.bench.workloads import Workload
from lmtool.child import module_command, module_environment
from lmtool.errors import ConfigError, LmtoolError

# common words, nearly all of them one token in any vocabulary of today
_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not"
    " what all were we when your can said there use an each which she do how their if will up other about out many then"
    " them these so some her would make like him into time has look two more write go see number no way could people my"
    " than first water been call who oil its now find long down day did get come made may part"
)
WORDS = _COMMON.split()
_NUM_STATIC = 100
_START_S = 3.0  # until several clients are up; then they all begin
_LONGEST_LINE = 1 << 26  # an outcome has a time for each piece of text


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlinePlan:
    """What to send. token_ids: prompts are ids below this; None: words. Raises ConfigError, which names the flag."""

    url: str
    model: str | None = None
    mix: str = "static"
    num_prompts: int | None = None
    input_len: int = 128
    output_len: int = 128
    request_rate: float = float("inf")
    max_concurrency: int | None = None
    endpoint: str = "completions"
    token_ids: int | None = None
    ignore_eos: bool = True
    timeout_s: float = 600.0
    seed: int = 0
    num_clients: int = 1

    def __post_init__(self) -> None:
        api_url(self.url)
        for name in ("num_prompts", "input_len", "output_len", "max_concurrency", "token_ids"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}", "give 1 or more")
        if not 1 <= self.num_clients <= 64:
            raise ConfigError(f"--clients is {self.num_clients}", "give 1 to 64")
        if self.max_concurrency is not None and self.max_concurrency < self.num_clients:
            raise ConfigError(f"--clients is {self.num_clients}", f"at most --max-concurrency {self.max_concurrency}")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}", "give 0 or more")
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate is {self.request_rate:g}", "give requests per second, or inf")
        if not self.timeout_s > 0:
            raise ConfigError(f"--timeout is {self.timeout_s:g}", "give seconds")
        if self.endpoint not in ("completions", "chat"):
            raise ConfigError(f"--endpoint is {self.endpoint!r}", "give completions or chat")
        if self.token_ids is not None and self.endpoint == "chat":
            raise ConfigError("--token-ids has no place in a chat's messages", "give --endpoint completions")

    def workload(self) -> Workload:
        if self.mix == "static":
            return workloads.static(self.num_prompts or _NUM_STATIC, self.input_len, self.output_len)
        if self.num_prompts is not None and self.mix[-1:].isdigit():
            raise ConfigError(f"--mix {self.mix} and --num-prompts both give a number", "give one of them")
        return workloads.mix(self.mix + (str(self.num_prompts) if self.num_prompts else ""), self.seed)

    def questions(self) -> list[Question]:
        return questions_of(self.workload(), self.seed, self.token_ids)

    @property
    def name(self) -> str:
        rate = "" if self.request_rate == float("inf") else f", {self.request_rate:g} req/s"
        at_once = "" if self.max_concurrency is None else f", {self.max_concurrency} at once"
        return f"{self.workload().name}{rate}{at_once}"


def questions_of(workload: Workload, seed: int, token_ids: int | None = None) -> list[Question]:
    """Prompts of random words, or of random ids below ``token_ids``. A shared prefix is shared as words, too."""
    prompts = workload.prompts(token_ids or len(WORDS), seed)
    return [
        Question(ids if token_ids else " ".join(WORDS[i] for i in ids), size.num_new_tokens)
        for ids, size in zip(prompts, workload.sizes, strict=True)
    ]


def run_online(
    plan: OnlinePlan, *, api_key: str | None = None, json_file: str | None = None, png: Path | None = None
) -> Report:
    """A table on stdout (stderr where the JSON goes to stdout).

    Raises InputError where no server answers, LmtoolError where it answered no request, and KeyboardInterrupt again
    after what was measured until then has been told.
    """
    outputs.check(json_file, png)
    questions = plan.questions()
    run = Session(plan, questions)
    notices, interrupted = make_console(stderr=True), False
    with notices.status("asking for the server's model") as status:
        try:
            asyncio.run(run.run(api_key, status.update))
        except KeyboardInterrupt:
            interrupted = True
    report = run.report()
    outcomes = run.outcomes
    if any(one.failure is None for one in outcomes):
        outputs.write(report, json_file, png)
    elif json_file is not None:
        outputs.write(report, json_file, None)  # there is nothing to draw
    show(report, notices if json_file == "-" else make_console())
    if interrupted:
        raise KeyboardInterrupt
    if outcomes and all(one.failure is not None for one in outcomes):
        failure = str(outcomes[0].failure)
        fix = "add --no-ignore-eos" if "ignore_eos" in failure else None  # not all servers know that field
        raise LmtoolError(f"none of {len(outcomes)} requests was answered: {failure}", fix)
    return report


class Session:
    """A run and what came of it so far."""

    def __init__(self, plan: OnlinePlan, questions: Sequence[Question]) -> None:
        self.plan = plan
        self.outcomes: list[Outcome] = []
        self.model = plan.model
        self._questions = questions
        self._started_s = self._stopped_s = self._cpu_s = 0.0
        self._progress: Callable[[str], None] = lambda line: None

    def now(self) -> float:
        return time.perf_counter() - self._started_s

    async def run(self, api_key: str | None, progress: Callable[[str], None] = lambda line: None) -> None:
        self._progress = progress
        async with make_client(api_key) as client:
            self.model = self.model or await first_model(client, self.plan.url)
            # processes need a moment before they are there
            lead_s = _START_S if self.plan.num_clients > 1 else 0.0
            self._started_s, cpu_s = time.perf_counter() + lead_s, time.process_time()
            shares = self._shares(api_key)
            try:
                if len(shares) == 1:
                    await send_all(client, shares[0], self._take)
                    self._cpu_s = time.process_time() - cpu_s
                else:
                    async with asyncio.TaskGroup() as tasks:
                        for share in shares:
                            tasks.create_task(self._run_client(share))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            except BaseException:  # interrupted
                self._stopped_s = self.now()
                raise

    def _shares(self, api_key: str | None) -> list[Share]:
        """Every so-manieth request, so that each client has a like part of the load."""
        plan, questions = self.plan, self._questions
        server = Server(plan.url, str(self.model), plan.endpoint, plan.ignore_eos, plan.timeout_s)
        starts_s, count = arrivals(plan, len(questions)), min(plan.num_clients, len(questions))
        at_once = plan.max_concurrency or len(questions)
        return [
            Share(
                server=server,
                questions=questions[i::count],
                starts_s=starts_s[i::count],
                max_concurrency=at_once // count + (i < at_once % count),
                api_key=api_key,
                started_s=self._started_s,
            )
            for i in range(count)
        ]

    async def _run_client(self, share: Share) -> None:
        process = await asyncio.create_subprocess_exec(
            *module_command("lmtool.bench.online_worker"),
            env=module_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(share.as_json())
            async for line in process.stdout:
                found = json.loads(line)
                if "cpu_s" in found:
                    self._cpu_s += found["cpu_s"]
                else:
                    self._take(Outcome(**found))
            if await process.wait():
                raise LmtoolError(f"a client process ended with {process.returncode}", "see what it said above")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _take(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._stopped_s = self.now()
        num_failed = sum(one.failure is not None for one in self.outcomes)
        failed = f", {num_failed} failed" if num_failed else ""
        self._progress(f"{len(self.outcomes)} of {len(self._questions)} requests answered{failed}")

    def report(self) -> Report:
        """Of what has come until now."""
        duration_s = max(self._stopped_s, 1e-9)
        num_unfinished = len(self._questions) - len(self.outcomes)
        found = result(self.plan.name, self.outcomes, duration_s, num_unfinished)
        found["client_cpu_share"] = self._cpu_s / duration_s / self.plan.num_clients
        settings = {**asdict(self.plan), "request_rate": str(self.plan.request_rate)}
        report = make_report(str(self.model), "", None, settings)
        cores = f"client: {len(os.sched_getaffinity(0))} cores"
        return dataclasses.replace(report, engine=f"server at {self.plan.url}", device=cores, results=[found])


def arrivals(plan: OnlinePlan, count: int) -> list[float]:
    """Seconds at which requests are sent: all at once, or as a Poisson process whose first is at 0."""
    if plan.request_rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(plan.seed).exponential(1 / plan.request_rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]

"""The policy on plain data: what it chooses, what it forgets, and what it gains over chance."""

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtool.cluster.prefixes import STEP_BYTES, prompt_text, read_prompt
from lmtool.cluster.routing import Policy, Prompt, Router, Ticket

TWO = ("a", "b")


def prompt(*words: str, tokens_each: int = 100) -> Prompt:
    """A beginning ends after each word."""
    hashes = tuple(hash(words[: i + 1]) for i in range(len(words)))
    return Prompt(hashes, tuple(tokens_each * (i + 1) for i in range(len(words))), tokens_each * len(words))


def router(*names: str, cache_tokens: int = 100_000) -> Router:
    made = Router()
    made.set_replicas(dict.fromkeys(names, cache_tokens))
    return made


def take(router: Router, *words: str, num_new: int = 0, among: tuple[str, ...] = TWO) -> Ticket:
    ticket = router.take(prompt(*words), num_new, among)
    assert ticket is not None
    return ticket


# ---------------------------------------------------------------------- the rule
def test_a_conversation_stays_where_its_beginning_is():
    one = router(*TWO)
    first = take(one, "system", "question")
    one.end(first)
    for _ in range(5):
        other = take(one, "elsewhere", "at all")
        again = take(one, "system", "question", "answer", "more")
        assert again.name == first.name
        one.end(other)
        one.end(again)


def test_the_longest_beginning_wins_over_a_shorter_one():
    one = router(*TWO)
    short = take(one, "system", among=("a",))
    long = take(one, "system", "question", among=("b",))
    one.end(short)
    one.end(long)
    assert one.choose(prompt("system", "question", "more"), TWO) == "b"
    assert one.choose(prompt("system", "other"), TWO) == "a"  # as long at both: who remembers less


def test_what_is_new_goes_to_the_fewest_queued_tokens_then_to_the_emptiest_cache_then_by_name():
    one = router(*TWO)
    assert take(one, "first").name == "a"
    ticket = take(one, "second", "long")
    assert ticket.name == "b"
    assert one.choose(prompt("third"), TWO) == "a"  # 100 tokens queue there, 200 at b
    one.end(ticket)
    assert one.choose(prompt("third"), TWO) == "b"
    fresh = router(*TWO)
    fresh.end(take(fresh, "first"))
    assert take(fresh, "second").name == "b"


def test_a_replica_attracts_for_as_many_tokens_as_it_saves():
    one = router(*TWO)
    one.end(take(one, "system", among=("a",)))
    take(one, "filler", among=("a",))
    assert one.choose(prompt("system", "x"), TWO) == "a"  # 100 more wait there, 100 are saved
    take(one, "a little", num_new=-99, among=("a",))
    assert one.choose(prompt("system", "x"), TWO) == "b"  # 101 more wait


def test_queues_within_a_quarter_count_as_even():
    one = router(*TWO)
    one.end(take(one, "system", among=("a",)))
    take(one, num_new=1000, among=("b",))
    busy = take(one, num_new=1350, among=("a",))
    assert one.choose(prompt("system", "x"), TWO) == "a"  # 350 = 100 saved + 1000 / 4
    one.end(busy)
    take(one, num_new=1351, among=("a",))
    assert one.choose(prompt("system", "x"), TWO) == "b"


def test_what_was_found_is_not_counted_as_work():
    one = router("a")
    first = take(one, "system", "question", num_new=10, among=("a",))
    assert first.num_tokens == 210
    assert take(one, "system", "question", "more", num_new=10, among=("a",)).num_tokens == 110
    assert one.queued_tokens("a") == 320
    one.end(first, 200)
    assert one.queued_tokens("a") == 120
    one.end(first)
    one.end(first)
    assert one.queued_tokens("a") == 110


def test_the_other_policies_do_not_look_at_beginnings():
    by_queue = Router(Policy.LEAST_QUEUED)
    by_queue.set_replicas(dict.fromkeys(TWO, 1000))
    by_queue.end(take(by_queue, "system", among=("b",)))
    assert by_queue.choose(prompt("system"), TWO) == "a"
    take(by_queue, "other", among=("a",))
    assert by_queue.choose(prompt("system"), TWO) == "b"
    by_chance = Router(Policy.RANDOM, random.Random(1))
    by_chance.set_replicas(dict.fromkeys(TWO, 1000))
    assert {take(by_chance, "system").name for _ in range(20)} == {"a", "b"}
    assert by_chance.choose(prompt("x"), ()) is None


# ---------------------------------------------------------------------- who comes and goes
def test_nobody_is_chosen_where_nobody_is():
    assert Router().take(prompt("a"), 1, TWO) is None
    assert router("a").take(prompt("a"), 1, ()) is None
    assert router("a").choose(prompt("a"), ("b",)) is None


def test_who_is_gone_is_forgotten_and_begins_anew():
    one = router(*TWO)
    ticket = take(one, "system", among=("a",))
    one.set_replicas({"b": 100_000})
    assert one.choose(prompt("system"), TWO) == "b"
    one.set_replicas(dict.fromkeys(TWO, 100_000))
    assert one.remembered_tokens("a") == one.queued_tokens("a") == 0
    take(one, "new", among=("a",))
    one.end(ticket)  # of its former life
    assert one.queued_tokens("a") == 100


def test_an_engine_that_was_started_again_has_nothing_in_its_cache():
    one = router(*TWO)
    take(one, "system", among=("a",))
    one.forget_cache("a")
    one.forget_cache("nobody")
    assert (one.remembered_tokens("a"), one.queued_tokens("a")) == (0, 100)


def test_what_the_cache_cannot_hold_any_more_does_not_attract():
    one = router(*TWO, cache_tokens=300)
    one.end(take(one, "system", "question", among=("a",)))
    one.end(take(one, "other", "one", among=("a",)))  # takes the place of "question", the longest of what was before
    assert one.remembered_tokens("a") == 300
    one.end(take(one, "system", among=("b",)))
    assert one.choose(prompt("system", "question"), TWO) == "b"  # as long at both: who remembers less
    one.end(take(one, "third", "one", "two", among=("a",)))
    assert one.choose(prompt("other"), ("a",)) == "a"
    assert one.choose(prompt("third", "one"), TWO) == "a"


# ---------------------------------------------------------------------- whatever happens
WORDS = st.lists(st.sampled_from("abc"), max_size=6).map(lambda words: prompt(*words))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), WORDS, st.integers(0, 500)),
        st.tuples(st.just("end"), st.integers(0, 50), st.none() | st.integers(0, 300)),
        st.tuples(st.just("replicas"), st.sets(st.sampled_from("wxyz"))),
        st.tuples(st.just("forget"), st.sampled_from("wxyz")),
    ),
    max_size=60,
)


@given(STEPS, st.integers(0, 900))
def test_queues_are_what_is_open_and_memory_is_bounded_and_beginnings_have_no_holes(steps, cache_tokens):
    one, names, tickets = Router(), set(), []
    lives: dict[str, int] = {}
    for kind, *given_ in steps:
        if kind == "take":
            asked, num_new = given_
            ticket = one.take(asked, num_new, "wxyz")
            assert (ticket is None) == (not names)
            if ticket is not None:
                assert ticket.name in names
                tickets.append((ticket, lives[ticket.name]))
        elif kind == "end" and tickets:
            one.end(tickets[given_[0] % len(tickets)][0], given_[1])
        elif kind == "replicas":
            for name in given_[0] - names:
                lives[name] = lives.get(name, 0) + 1
            names = given_[0]
            one.set_replicas(dict.fromkeys(names, cache_tokens))
        elif kind == "forget":
            one.forget_cache(given_[0])
        for name in "wxyz":
            open_ = sum(t.num_tokens for t, life in tickets if t.name == name and name in names and life == lives[name])
            assert one.queued_tokens(name) == open_
            assert one.remembered_tokens(name) <= cache_tokens
        for replica in one._replicas.values():
            assert replica.seen_tokens == sum(replica.seen.values())
            for asked in (prompt(*"abcabc"), prompt(*"cba"), prompt(*"aaaaaa")):
                known = [one_ in replica.seen for one_ in asked.hashes]
                assert known == sorted(known, reverse=True)


@given(STEPS)
def test_the_same_calls_give_the_same_choices(steps):
    def choices() -> list[str | None]:
        one, made = Router(), []
        for kind, *given_ in steps:
            if kind == "take":
                ticket = one.take(given_[0], given_[1], sorted("wxyz", key=lambda _: random.random()))
                made.append(ticket and ticket.name)
            elif kind == "replicas":
                one.set_replicas(dict.fromkeys(given_[0], 500))
        return made

    assert choices() == choices()


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=6), st.integers(0, 20))
def test_no_replica_is_chosen_that_is_further_behind_than_it_saves(queues, num_words):
    names = [str(i) for i in range(len(queues))]
    one = router(*names)
    asked = prompt(*map(str, range(num_words)))
    one.end(take(one, *map(str, range(num_words)), among=("0",)))
    for name, queue in zip(names, queues, strict=True):
        take(one, num_new=queue, among=(name,))
    chosen = one.choose(asked, names)
    saved = asked.num_tokens if chosen == "0" else 0
    assert queues[int(chosen)] - min(queues) <= saved + min(queues) // 4


# ---------------------------------------------------------------------- prompts
def test_a_conversation_begins_as_its_turn_before():
    turn = [{"role": "system", "content": "s" * 3000}, {"role": "user", "content": "q" * 1000}]
    first = read_prompt({"messages": turn})
    later = read_prompt({"messages": [*turn, {"role": "assistant", "content": "a" * 9000}], "temperature": 1})
    assert first.hashes == later.hashes[: len(first.hashes)]
    assert len(later.hashes) > len(first.hashes) > 10
    assert later.num_tokens == (3000 + 1000 + 9000 + len("system0user0assistant000")) // 4
    other = read_prompt({"messages": [{"role": "system", "content": "t" * 3000}, turn[1]]})
    assert not set(other.hashes) & set(first.hashes)
    assert other.ends[-1] <= other.num_tokens


def test_tools_are_a_difference_in_front():
    body = {"messages": [{"role": "user", "content": "q" * 3000}]}
    with_tools = read_prompt({**body, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert not set(with_tools.hashes) & set(read_prompt(body).hashes)


def test_an_input_is_read_as_messages_are():
    turn = [{"role": "user", "content": "q" * 3000}]
    assert read_prompt({"input": turn}) == read_prompt({"messages": turn})
    assert read_prompt({"input": "x" * 1024}) == read_prompt({"prompt": "x" * 1024})
    instructed = read_prompt({"input": turn, "instructions": "be brief"})
    assert not set(instructed.hashes) & set(read_prompt({"input": turn}).hashes)


def test_prompts_are_texts_or_ids():
    text = read_prompt({"prompt": "x" * 1024})
    assert (len(text.hashes), text.ends, text.num_tokens) == (4, (64, 128, 192, 256), 256)
    ids = list(range(1000, 2000))
    counted = read_prompt({"prompt": ids})
    assert counted.num_tokens == 1000
    assert read_prompt({"prompt": ids[:500]}).hashes == counted.hashes[: len(read_prompt({"prompt": ids[:500]}).hashes)]
    assert len(read_prompt({"prompt": ["a" * 600, "b"]}).hashes) == 2


@pytest.mark.parametrize(
    "body", [{}, {"messages": 3}, {"messages": [3, None]}, {"prompt": {}}, {"prompt": "\ud800" * 999}]
)
def test_what_is_malformed_is_the_replicas_to_refuse(body):
    assert read_prompt(body).num_tokens >= 0


def test_the_longest_body_has_few_hashes():
    asked = read_prompt({"prompt": "y" * (8 << 20)})
    assert len(asked.hashes) < 200
    assert all(end > start for start, end in zip(asked.ends, asked.ends[1:], strict=False))
    assert read_prompt({"prompt": "y" * (STEP_BYTES - 1)}).hashes == ()


def test_the_order_of_keys_is_no_difference():
    one = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    other = {"content": [{"text": "x", "type": "text"}], "role": "user"}
    assert prompt_text({"messages": [one]}) == prompt_text({"messages": [other]})


# ---------------------------------------------------------------------- what it gains
class Cache:
    """A replica's: prefixes of texts in blocks, the latest used ones, as many as there is room for."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks: OrderedDict[int, None] = OrderedDict()
        self.num_blocks = num_blocks

    def look_up(self, text: str) -> tuple[int, int]:
        """Blocks that were found, and all of them."""
        chain = [hash(text[:end]) for end in range(STEP_BYTES, len(text) + 1, STEP_BYTES)]
        num_found = next((i for i, one in enumerate(chain) if one not in self.blocks), len(chain))
        for one in reversed(chain):
            self.blocks[one] = None
            self.blocks.move_to_end(one)
        while len(self.blocks) > self.num_blocks:
            self.blocks.popitem(last=False)
        return num_found, len(chain)


def hit_rate(choose_by_chance: bool, seed: int) -> tuple[float, float]:
    """Two models with two replicas each, 48 long beginnings a model, of which a cache holds about a third; some
    requests are in flight at any time. Gives the share of blocks that were found, and the busier replica's share of
    the work. (Where a cache holds half, it is 1.55 x chance; where it holds all, chance finds all, too.)"""
    chance = random.Random(seed)
    found = total = 0
    shares = []
    for model in ("m", "n"):
        one = router(*TWO, cache_tokens=200 * 64)
        caches = {name: Cache(num_blocks=200) for name in TWO}
        beginnings = [f"{model} {i} " + chance.randbytes(1500).hex() for i in range(48)]
        in_flight: list[Ticket] = []
        work = dict.fromkeys(TWO, 0)
        for number in range(1500):
            text = chance.choice(beginnings) + f" {number} " + chance.randbytes(200).hex()
            asked = read_prompt({"prompt": text})
            among = (chance.choice(TWO),) if choose_by_chance else TWO
            ticket = one.take(asked, chance.randrange(20, 200), among)
            assert ticket is not None
            in_flight.append(ticket)
            num_found, num_blocks = caches[ticket.name].look_up(text)
            found, total = found + num_found, total + num_blocks
            work[ticket.name] += asked.num_tokens
            while len(in_flight) > 8:
                one.end(in_flight.pop(chance.randrange(len(in_flight))))
        shares.append(max(work.values()) / sum(work.values()))
    return found / total, max(shares)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_mix_with_shared_beginnings_is_found_more_often_than_by_chance(seed):
    (routed, share), (by_chance, _) = hit_rate(False, seed), hit_rate(True, seed)
    print(f"found: routed {routed:.3f}, by chance {by_chance:.3f}, {routed / by_chance:.2f} x; busier {share:.2f}")
    assert routed >= 1.5 * by_chance
    assert share < 0.6

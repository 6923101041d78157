"""Replicas that no machine has room for are refused before anything is started, with what would fit."""

import pytest

from lmtool.cluster.machines import Machine, check_fit
from lmtool.cluster.spec_reader import parse_models
from lmtool.errors import ConfigError


def machine(number: int = 1, cpus: float = 8, gpus: float = 0) -> Machine:
    return Machine(f"10.0.0.{number}", cpus, gpus)


def refusal(text: str, *there: Machine) -> str:
    with pytest.raises(ConfigError) as refused:
        check_fit(parse_models(text.split()), there)
    return str(refused.value)


def test_what_fits_nowhere_is_said_beside_what_there_is():
    assert refusal("a,cpus=9", machine(), machine(2, cpus=4)) == (
        "no machine has 9 CPUs and 0 GPUs for a replica of a; "
        "lower cpus or gpus; there is 10.0.0.1: 8 CPUs, 0 GPUs; 10.0.0.2: 4 CPUs, 0 GPUs"
    )
    assert refusal("a,gpus=1", machine()).startswith("no machine has 1 CPUs and 1 GPUs for a replica of a; lower cpus")


@pytest.mark.parametrize(
    ("text", "there", "words"),
    [
        ("a,tp=4", [machine(gpus=2)], "tp=2 would fit"),
        ("a,tp=4", [machine(gpus=2), machine(2, gpus=2)], "tp=4,nnodes=2 would fit"),
        ("a,tp=8,nnodes=2", [machine(gpus=8), machine(2, gpus=2)], "tp=8 would fit"),
        ("a,tp=3", [machine(gpus=2)], "tp=2 would fit"),
    ],
)
def test_what_would_fit_is_named(text, there, words):
    assert words in refusal(text, *there)


def test_a_replica_of_several_machines_has_its_part_on_each():
    there = [machine(gpus=4), machine(2, gpus=4)]
    check_fit(parse_models(["a,tp=8,nnodes=2"]), there)
    words = refusal("a,tp=2,nnodes=2,device=cpu,cpus=6", machine(), machine(2, cpus=4))
    assert words.startswith("there are no 2 machines with 6 CPUs and 0 GPUs for a replica of a; lower cpus or gpus;")
    assert "together need 16 CPUs and 16 GPUs" in refusal("a,tp=8,nnodes=2,replicas=2,cpus=4", *there)


def test_all_together_have_to_fit_with_as_few_as_there_may_be():
    together = "all replicas together need 12 CPUs and 0 GPUs, and the cluster has 8 and 0"
    assert together in refusal("a,cpus=4,replicas=2 b,cpus=4", machine())
    assert "need 3 CPUs and 3 GPUs, and the cluster has 8 and 2" in refusal("a,replicas=3", machine(gpus=2))
    check_fit(parse_models(["a,replicas=2", "b,device=cpu,cpus=6"]), [machine(gpus=2)])
    check_fit(parse_models(["a,min-replicas=2,max-replicas=9"]), [machine(gpus=2)])

"""What is to be served, from a file and from texts; everything wrong is refused by name."""

from pathlib import Path

import pytest

from lmtool.cluster.spec import ClusterSpec, ModelSpec
from lmtool.cluster.spec_reader import parse_models, read_spec
from lmtool.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "cluster").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_files_in_configs_are_sound(path):
    assert read_spec(path).models


def test_a_file_and_texts_say_the_same(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text(
        '[[models]]\nmodel = "a/b"\nname = "chat"\nreplicas = 2\ncache-gb = 0.5\nmax_queue = 3\n'
        'request-timeout = 9.5\n[[models]]\nmodel = "c"\ndevice = "cpu"\nprefix-caching = false\n'
    )
    texts = [
        "a/b,name=chat,replicas=2,cache-gb=0.5,max-queue=3,request-timeout=9.5",
        "c,device=cpu,prefix_caching=false",
    ]
    assert read_spec(path) == parse_models(texts)
    first, second = read_spec(path).models
    assert first == ModelSpec(
        model="a/b",
        name="chat",
        replicas=2,
        engine={"cache_gb": 0.5},
        server={"max_queue": 3, "request_timeout_s": 9.5},
    )
    assert second.engine == {"device": "cpu", "prefix_caching": False}
    config = first.server_config(port=0)
    assert (config.model_names, config.max_queue, config.request_timeout_s) == (("chat",), 3, 9.5)
    assert read_spec(path).names == ("chat", "c")


def test_a_path_is_called_by_its_last_part(tmp_path):
    assert parse_models([str(tmp_path)]).models[0].name == tmp_path.name
    assert parse_models(["org/name"]).models[0].name == "org/name"


def test_a_name_that_looks_like_a_number_stays_what_it_is_in_its_field():
    assert parse_models(["a,revision=main"]).models[0].revision == "main"
    with pytest.raises(ConfigError, match="revision is 12; give a text"):
        parse_models(["a,revision=12"])


def test_gpus_are_kept_free_where_there_are_any():
    spec, on_cpu, told = parse_models(["a", "b,device=cpu", "c,gpus=0"]).models
    assert [one.num_gpus(cluster_has_gpus=True) for one in (spec, on_cpu, told)] == [1, 0, 0]
    assert [one.num_gpus(cluster_has_gpus=False) for one in (spec, on_cpu, told)] == [0, 0, 0]
    shared = parse_models(["e,tp=2"]).models[0]
    assert (shared.num_gpus(cluster_has_gpus=True), shared.engine_settings()) == (2, {"tp": 2})
    assert spec.engine_settings() == {}
    assert parse_models(["d,gpus=1"]).models[0].num_gpus(cluster_has_gpus=False) == 1  # asked for: refused later


def test_how_many_replicas_there_may_be():
    fixed, free = parse_models(["a,replicas=3", "b,min-replicas=1,max-replicas=4,target-requests=2.5"]).models
    assert (fixed.bounds, free.bounds, free.target_requests) == ((3, 3), (1, 4), 2.5)


def test_hosts_of_pictures_are_one_or_a_list(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text('[[models]]\nmodel = "a"\nallowed-image-hosts = ["x.org", "y.org:80"]')
    assert read_spec(path).models[0].server == {"allowed_image_hosts": ("x.org", "y.org:80")}
    assert parse_models(["a,allowed-image-hosts=x.org"]).models[0].server == {"allowed_image_hosts": ("x.org",)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "model is ''"),
        ("a,replicas", "'replicas' has no value"),
        ("a,replicas=0", "replicas is 0; give 1 to 1024"),
        ("a,replicas=two", "replicas is 'two'"),
        ("a,replicas=true", "replicas is True"),
        ("a,replicas=2,replicas=3", "'replicas' is there twice"),
        ("a,max-queue=2,max_queue=3", "'max_queue' is there twice"),
        ("a,tp=0", "tp is 0; give a number of GPUs"),
        ("a,tp=4,nnodes=3", "nnodes is 3; give a number of machines that divides tp=4"),
        ("a,nnodes=2", "nnodes is 2; give a number of machines that divides tp=1"),
        ("a,tp=2,rank-hosts=x:1", "'rank-hosts' is no setting"),
        ("a,min-replicas=2", "max-replicas is None; give both bounds"),
        ("a,min-replicas=0,max-replicas=2", "min-replicas is 0; give both bounds, each 1 to 1024"),
        ("a,min-replicas=3,max-replicas=2", "min-replicas is 3 and max-replicas 2; give the larger one as max"),
        ("a,min-replicas=1,max-replicas=2,replicas=2", "replicas is 2 beside its bounds"),
        ("a,target-requests=0", "target-requests is 0"),
        ("a,scale-up-delay=-1", "scale-up-delay is -1"),
        ("a,scale-down-delay=soon", "scale-down-delay is 'soon'"),
        ("a,tp=2,gpus=1", "gpus is 1; give 0 or tp"),
        ("a,cpus=-1", "cpus is -1"),
        ("a,cpus=nan", "cpus is nan"),
        ("a,name=two words", "name is 'two words'"),
        ("a,name=", "name is ''"),
        ("a,replica=2", "'replica' is no setting"),
        ("a,cache-gb=-1", "--cache-gb is -1"),
        ("a,cache-gb=much", "--cache-gb is 'much'"),
        ("a,max-queue=-1", "--max-queue is -1"),
        ("a,max-queue=many", "max-queue is 'many'; give a whole number"),
        ("a,request-timeout=false", "request-timeout is False; give a number"),
        ("a,allowed-image-hosts=4", "allowed-image-hosts is 4; give a list of texts"),
        ("a,api-keys=x", "'api-keys' is no setting"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text, words):
    with pytest.raises(ConfigError) as refused:
        parse_models([text])
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"--model {text}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models = 3", "models is no list of tables"),
        ("models = [1]", "models is no list of tables"),
        ("port = 3", "'port' is no setting"),
        ("[[models]]\nreplicas = 2", "model 1 has no model"),
        ('[[models]]\nmodel = "a"\n[[models]]\nmodel = 3', "model 2: model is 3"),
        ('[[models]]\nmodel = "a"\nengine = 3', "'engine' is no setting"),
        ('[[models]]\nmodel = "a"\n[[models]]\nmodel = "a"', "two models are called 'a'"),
        ("", "there is no model to serve"),
        ("[[models", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_spec(path)
    assert words in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="there is no model"):
        ClusterSpec(())

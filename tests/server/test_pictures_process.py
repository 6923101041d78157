"""Pictures and the server as users start it: a process of its own, with a tiny LLaVA."""

from pathlib import Path

from tests.server.pictures import data_url, picture, says
from tests.server.process import Process
from tests.tiny_llava import tiny_llava


def test_a_server_of_several_processes_sees(tmp_path):
    """Its settings come from a file; no HTTP process has tensors; a session goes on in whichever of them is asked."""
    tiny_llava(tmp_path / "eye")
    (tmp_path / "server.toml").write_text('allowed-image-hosts = ["pictures.example.org"]\nmax-images = 2\n')
    # float32: a prompt that is found in the cache is computed in another shape
    flags = ("--config", "server.toml", "--device", "cpu", "--dtype", "float32", "--cache-gb", "0.1")
    with Process(*flags, "--http-processes", "2", model="./eye", folder=tmp_path) as server:
        server.wait_until_listening(2)
        red, blue = data_url(picture(seed=1)), data_url(picture(seed=2))
        texts = set()
        for _ in range(4):  # each client is a connection of its own, to one of the two
            with server.client() as http:
                body = {"messages": [says("What is this?", red, blue)], "temperature": 0, "max_tokens": 6}
                answer = http.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                texts.add(answer.json()["choices"][0]["message"]["content"])
        assert len(texts) == 1
        history = 0
        for url in (red, blue, None):
            with server.client() as http:
                body = {"prompt": "And this?", "session_id": 1, "interactive_mode": True, "request_output_len": 3}
                answer = http.post("/v1/chat/interactive", json=body | ({"image_url": url} if url else {})).json()
            assert answer["history_tokens"] == history
            assert answer["input_tokens"] > 16 * (url is not None)
            history += answer["input_tokens"] + answer["tokens"]
        with server.client() as http:
            body = {"messages": [says("What are these?", red, blue, red)]}
            refused = http.post("/v1/chat/completions", json=body).json()["error"]
            assert refused["message"] == "there are 3 pictures; give at most 2"
            assert "lmtool:images_total" in http.get("/metrics").text
        mapped = [Path(f"/proc/{pid}/maps").read_text() for pid, words in server.children().items() if "http" in words]
        mapped.append(Path(f"/proc/{server.process.pid}/maps").read_text())
        assert len(mapped) == 2
        assert all("libtorch" not in one for one in mapped)
        assert any("_imaging" in one for one in mapped)  # Pillow was there

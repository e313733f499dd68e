"""A short load that takes every way a request, or an adapter, can go through a server."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
BROKEN = "broken"  # an adapter whose object is gone
PROMOTED = "promoted"  # one that a merged model answers for


class ScriptedLoad:
    """Requests to one server that has the example adapters, PROMOTED, and `--max-waiting 3`.

    Its bank has room for one of them. Each method is one way, and asserts that it was taken.
    """

    def __init__(self, url: str, base: str, store: Path) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._base = base
        self._store = store

    def close(self) -> None:
        self._http.close()

    def every_way(self) -> None:
        """All of them, one after the other."""
        self.hits()
        self.misses_and_evictions()
        self.merged()
        self.unknown_name()
        self.failed_load()
        self.cancelled()
        self.rejected()

    def hits(self) -> None:
        """The base, and an adapter that is in the bank when its second request comes."""
        self._ask(self._base)
        self._ask("json")
        assert self._ask("json").headers["x-adapter-tier"] == "gpu"

    def misses_and_evictions(self) -> None:
        """Two adapters that drive each other out: from disk first, then from host memory."""
        tiers = [self._ask(name).headers["x-adapter-tier"] for name in ("pirate", "json", "pirate")]
        assert "gpu" not in tiers
        assert tiers[1:] == ["host", "host"]

    def merged(self) -> None:
        """A promoted adapter, once the engine has its model."""
        deadline = time.monotonic() + 60
        while self._ask(PROMOTED).headers["x-serving-path"] != "merged":
            assert time.monotonic() < deadline, "its model was not loaded"
            time.sleep(0.2)

    def unknown_name(self) -> None:
        assert self._post("nobody", 1).status_code == 404

    def failed_load(self) -> None:
        """An adapter is registered, and then its object vanishes from the store."""
        if self._http.get(f"/v1/adapters/{BROKEN}").status_code == 404:
            self._push_and_lose(BROKEN)
        reply = self._post(BROKEN, 4)
        assert reply.status_code == 500, reply.text
        assert reply.json()["error"]["code"] == "adapter_load_failed"

    def cancelled(self) -> None:
        """A reader that leaves in mid-stream."""
        with self._stream(self._base) as reply:
            next(reply.iter_lines())

    def rejected(self) -> None:
        """Three streams take every place; the fourth request is refused at once."""
        self._wait_until_idle()
        reading = threading.Barrier(4, timeout=60)
        enough = threading.Event()

        def read() -> None:
            with self._stream("json") as reply:
                assert reply.status_code == 200
                lines = reply.iter_lines()  # kept: the stream is closed with it
                next(lines)
                reading.wait()
                enough.wait(60)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        reading.wait()
        refused = self._post(self._base, 1)
        time.sleep(1.5)  # for a scrape to see them run
        enough.set()
        for reader in readers:
            reader.join(60)
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert refused.headers["retry-after"]

    def _wait_until_idle(self) -> None:
        """Wait until the engine has let go of every request, as the server did before it."""
        idle = re.compile(r"^vllm:num_requests_running\{[^}]*\} 0\.0$", re.MULTILINE)
        deadline = time.monotonic() + 60
        while not idle.search(self._http.get("/metrics").text):
            assert time.monotonic() < deadline, "a request that was dropped still runs"
            time.sleep(0.1)

    def _ask(self, model: str) -> httpx.Response:
        """One whole answer; right after a stream was dropped its place may not be free yet."""
        for _ in range(100):
            reply = self._post(model, 6)
            if reply.status_code != 503:
                break
            time.sleep(0.1)
        assert reply.status_code == 200, reply.text
        return reply

    def _post(self, model: str, num_tokens: int) -> httpx.Response:
        return self._http.post("/v1/completions", json=_body(model, num_tokens))

    def _stream(self, model: str) -> Any:
        body = _body(model, 1500) | {"stream": True}
        return self._http.stream("POST", "/v1/completions", json=body)

    def _push_and_lose(self, name: str) -> None:
        folder = ROOT / "adapters" / "examples" / "pirate"
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] += 1  # another digest than pirate's: the object is its own
        files = {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
        }
        pushed = self._http.post(
            "/v1/adapters",
            data={"name": name},
            files=[(file, (file, content)) for file, content in files.items()],
        )
        assert pushed.status_code == 201, pushed.text
        digest = self._http.get(f"/v1/adapters/{name}/revisions").json()["data"][0]["digest"]
        (self._store / "objects" / f"{digest}.safetensors").unlink()


def _body(model: str, num_tokens: int) -> dict[str, Any]:
    """A prompt of more than one KV block, so that the prefix cache has something to find."""
    prompt = "Once upon a time there was a train that went from the mountains to the sea. " * 3
    return {"model": model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}

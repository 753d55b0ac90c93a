"""The timeline as users get it: over HTTP, as a trace for Perfetto, as a file, and drawn by a real browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from zero_stack import ZeroStack

from polymux.cluster.config import ClusterConfig
from polymux.cluster.local import LocalCluster
from polymux.cluster.timelines import COLUMNS
from polymux.deploy.demo.run import CONFIG
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.auth import hash_key
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.deploy.timeline.chrome import trace
from polymux.deploy.timeline.page import encode, render
from polymux.deploy.timeline.write import write
from polymux.transport.errors import InvalidRequest
from polymux.transport.units import ClientId

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOW_S = 1_790_000_000.0


def lane(worker_id: str, *spans: tuple[Any, ...], **fields: Any) -> dict[str, Any]:
    given = {"worker_id": worker_id, "role": "decode", "age_s": 0.0, "epoch": 1, "missing": None, "uncertainty_s": 0.0}
    return given | {"spans": [list(span) for span in spans]} | fields


def reply(*lanes: dict[str, Any]) -> dict[str, Any]:
    return {"now_s": NOW_S, "within_s": 300.0, "columns": list(COLUMNS), "lanes": list(lanes)}


def many(worker_id: str, number: int) -> dict[str, Any]:
    """Back to back: model after model, each with a switch, a decode and a transfer of 10 ms."""
    spans: list[tuple[Any, ...]] = []
    for i in range(number // 3):
        began_s, model = 0.03 * (number // 3 - i), f"model-{i % 7}"
        spans.append(("switch", model, began_s, 0.01, 1 << 20, 0, 0, 1))
        spans.append(("decode", model, began_s - 0.01, 0.01, 0, 1 + i % 8, 8, 2))
        spans.append(("kv_in", model, began_s - 0.02, 0.01, 4096, 1, 16, 1))
    return lane(worker_id, *spans)


# -- over HTTP --------------------------------------------------------------------------------------------------------


async def test_a_real_cluster_shows_prefill_transfer_and_decode_in_their_order() -> None:
    torch.set_num_threads(1)
    config = ClusterConfig.load(CONFIG)
    before = asyncio.get_running_loop().time()
    async with LocalCluster(config) as cluster:
        frontdoor = FrontDoor(FrontDoorSettings(client_id=ClientId("front"), token=config.security.cluster_token), cluster)
        app = build_asgi(frontdoor)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            body = {"prompt": "the list", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            for model in ("llama-small", "qwen3-small"):
                (await client.post("/v1/completions", json={"model": model, **body}, timeout=60)).raise_for_status()
            await cluster.topology()
            found = (await client.get("/v1/polymux/timeline")).json()
    spans = {}
    for one in found["lanes"]:
        assert one["missing"] is None
        for kind, model, began_s, seconds, nbytes, num_seqs, num_tokens, _ in one["spans"]:
            start_s = -one["age_s"] - began_s
            assert seconds >= 0 and asyncio.get_running_loop().time() - before >= -start_s
            if model == "llama-small" and kind not in spans:
                spans[kind] = (start_s, start_s + seconds, nbytes, num_seqs, num_tokens)
    assert {"active", "switch", "prefill", "kv_in", "decode"} <= spans.keys()
    assert spans["switch"][0] < spans["prefill"][1] <= spans["decode"][1]
    assert spans["kv_in"][1] <= spans["decode"][0] + 0.002
    assert spans["kv_in"][2] > 0 and spans["prefill"][4] > 0 and spans["decode"][4] <= 12


async def test_the_form_follows_the_query_and_what_the_asker_accepts(client: httpx.AsyncClient) -> None:
    plain = await client.get("/v1/polymux/timeline")
    assert plain.json()["lanes"] == [] and plain.headers["cache-control"] == "no-store"
    page = await client.get("/v1/polymux/timeline", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert page.text.startswith("<!doctype html>")
    chrome = await client.get("/v1/polymux/timeline?format=chrome")
    assert chrome.json()["traceEvents"] == [] and "attachment" in chrome.headers["content-disposition"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("format=svg", "format"),
        ("seconds=0", "seconds"),
        ("seconds=nan", "seconds"),
        ("seconds=3601", "seconds"),
        ("seconds=soon", "seconds"),
        ("limit=0", "limit"),
        ("limit=65537", "limit"),
        ("limit=-1", "limit"),
        ("limit=9999999999999", "limit"),
    ],
)
async def test_a_wrong_parameter_is_named(client: httpx.AsyncClient, query: str, param: str) -> None:
    response = await client.get(f"/v1/polymux/timeline?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_it_is_behind_the_key(make_stack: Callable[..., ZeroStack], connect: Callable[[ZeroStack], Any]) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("the-only-key"),)})
    async with connect(stack) as client:
        assert (await client.get("/v1/polymux/timeline")).status_code == 401


# -- for Perfetto -----------------------------------------------------------------------------------------------------


def test_a_trace_follows_the_event_format() -> None:
    overlapping = [("kv_in", "a", 3.0, 1.0, 10, 1, 5, 1), ("kv_in", "b", 2.5, 1.0, 10, 1, 5, 1), ("kv_in", "a", 1.9, 0.5, 10, 1, 5, 1)]
    found = trace(reply(lane("one", ("decode", "a", 4.0, 0.25, 0, 3, 30, 10), *overlapping), lane("two", missing="it did not answer")))
    assert found["displayTimeUnit"] == "ms"
    assert found["otherData"] == {"began_at_unix_s": NOW_S - 4.0, "missing": ["two"]}
    json.dumps(found, allow_nan=False)
    events = found["traceEvents"]
    assert all({"ph", "name", "pid", "tid", "ts"} <= event.keys() for event in events)
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    assert names == {"one", "two (missing: it did not answer)"}
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["ph"] for event in events} == {"M", "X"}
    decode = next(event for event in complete if event["cat"] == "decode")
    assert (decode["name"], decode["ts"], decode["dur"], decode["args"]["num_tokens"]) == ("a", 0.0, 250_000.0, 30)
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in complete:
        by_thread.setdefault((event["pid"], event["tid"]), []).append(event)
    for thread in by_thread.values():  # what overlaps within a thread would have to nest
        thread.sort(key=lambda event: float(event["ts"]))
        assert all(one["ts"] + one["dur"] <= other["ts"] + 1 for one, other in pairwise(thread))
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert by_thread.keys() == named


def test_lanes_of_hosts_whose_clocks_differ_share_one_axis() -> None:
    """The same moment, told by two workers whose answers are of different age."""
    early, late = ("switch", "a", 5.0, 1.0, 0, 0, 0, 1), ("switch", "a", 2.0, 1.0, 0, 0, 0, 1)
    found = trace(reply(lane("one", early, age_s=0.5), lane("two", late, age_s=3.5)))
    assert [event["ts"] for event in found["traceEvents"] if event["ph"] == "X"] == [0.0, 0.0]


# -- as a file --------------------------------------------------------------------------------------------------------


def test_a_file_is_what_its_name_says(tmp_path: Path) -> None:
    timeline = reply(many("one", 30), lane("two", missing="it did not answer"))
    assert write(timeline, tmp_path / "a.html", is_chrome=False) == "30 spans of 2 workers (missing: two)"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    write(timeline, tmp_path / "a.json", is_chrome=False)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(encode(timeline)) == timeline
    write(timeline, tmp_path / "a.trace", is_chrome=True)
    assert "traceEvents" in json.loads((tmp_path / "a.trace").read_text())
    with pytest.raises(InvalidRequest, match=r"\.html or \.json"):
        write(timeline, tmp_path / "a.txt", is_chrome=False)


def test_the_page_needs_no_network_and_no_name_ends_its_data() -> None:
    page = render(reply(lane("</script><script>alert(1)</script>", ("decode", "<!--", 1.0, 0.5, 0, 1, 1, 1))))
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page
    assert not [word for word in ("http://", "https://", "@import", "src=", "url(") if word in page]


# -- in a browser -----------------------------------------------------------------------------------------------------

USER = """
<script>
addEventListener("load", () => {
  const lanes = document.getElementById("lanes"), box = lanes.getBoundingClientRect(), seen = {}, root = document.documentElement;
  const at = (x, y) => ({clientX: box.left + x, clientY: box.top + y, bubbles: true, cancelable: true, pointerId: 1});
  const width = () => view.end - view.start, whole = width();
  const began = performance.now();
  for (let i = 0; i < 20; i++) draw();
  seen.draw_ms = (performance.now() - began) / 20;
  lanes.dispatchEvent(new WheelEvent("wheel", {...at(700, 40), deltaY: -240, ctrlKey: true}));
  seen.zoomed = width() / whole;
  const start = view.start;
  lanes.setPointerCapture = () => {};
  lanes.dispatchEvent(new PointerEvent("pointerdown", at(700, 40)));
  lanes.dispatchEvent(new PointerEvent("pointermove", at(600, 40)));
  lanes.dispatchEvent(new PointerEvent("pointerup", at(600, 40)));
  seen.panned = view.start > start;
  const track = lanes_of("decode"), i = track.n >> 1;
  show(track.start[i] - 1, track.end[i] + 1);
  lanes.dispatchEvent(new PointerEvent("pointermove", at(toX((track.start[i] + track.end[i]) / 2), track.y + track.height - 3)));
  seen.tip = document.getElementById("tip").innerText;
  lanes.dispatchEvent(new MouseEvent("dblclick", at(700, 40)));
  seen.fitted = width() / whole;
  document.querySelector("#legend button").click();
  seen.chosen = chosen >= 0;
  const light = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  seen.themes = light !== getComputedStyle(document.body).backgroundColor;
  seen.colors = Object.fromEntries(names().map((name, i) => [name, colors[i]]));
  root.dataset.seen = JSON.stringify(seen);
  function lanes_of(kind) { return window.eval("lanes")[0].tracks.find((one) => one.kind === kind); }
});
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
</script></body>"""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian `apt-get install chromium` brings it")


def browse(page: str, folder: Path, *flags: str) -> str:
    """The document after its scripts have run."""
    assert CHROMIUM is not None
    file = folder / "page.html"
    file.write_text(page, "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1280,900", "--virtual-time-budget=2000", *flags, "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def attribute(document: str, name: str) -> str | None:
    from html.parser import HTMLParser

    found: dict[str, str | None] = {}

    class Root(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "html":
                found.update(attrs)

    Root().feed(document[:20_000])
    return found.get(f"data-{name}")


@needs_chromium
def test_a_browser_draws_tens_of_thousands_of_spans_and_answers_the_pointer(tmp_path: Path) -> None:
    timeline = reply(many("decode-0", 30_000), many("decode-1", 30_000), lane("decode-2", missing="it did not answer within 2 s"))
    document = browse(render(timeline).replace("</body>", USER), tmp_path)
    assert attribute(document, "error") is None
    assert (attribute(document, "lanes"), attribute(document, "spans"), attribute(document, "models")) == ("3", "60000", "7")
    seen = json.loads(attribute(document, "seen") or "{}")
    assert seen["zoomed"] < 0.7 and seen["panned"] and seen["fitted"] == pytest.approx(1.0) and seen["chosen"] and seen["themes"]
    assert "decode" in seen["tip"] and "decode-0" in seen["tip"] and "model-" in seen["tip"]
    assert len(set(seen["colors"].values())) == 7
    assert seen["draw_ms"] < 250  # a few of them on an idle machine
    assert "1 missing" in document


@needs_chromium
def test_an_empty_timeline_is_a_page_too(tmp_path: Path) -> None:
    document = browse(render(reply()), tmp_path)
    assert attribute(document, "spans") == "0"

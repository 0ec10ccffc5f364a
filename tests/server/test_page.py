"""The web page: what is served and how, then the page in a real browser.

The second part needs Chromium and ChromeDriver (Debian: chromium, chromium-driver) and is skipped
without them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
from importlib.resources import files

import pytest

from pace_nb.server.app import ROUTES
from pace_nb.server.page import HEADERS, PAGE_PATHS, PAGE_ROUTES

FOLDER = files("pace_nb.server") / "static"
SOURCES = {one.name: one.read_text() for one in FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
    --disable-background-networking --disable-component-update --disable-sync
""".split()
STORY = "Tell me a story about a cat."
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
NEEDED = "needs pip install 'pace-nb[browser]' and, on Debian, apt install chromium chromium-driver"


def in_browser(test):
    """Marks a test that needs one; without one nothing is started for it."""
    there = BROWSER and DRIVER and importlib.util.find_spec("selenium")
    return pytest.mark.browser(pytest.mark.skipif(not there, reason=NEEDED)(test))


# ---- what is served ----


def test_each_file_is_served_as_what_it_is(server):
    kinds = {
        "html": "text/html",
        "css": "text/css",
        "js": "text/javascript",
        "svg": "image/svg+xml",
    }
    assert PAGE_PATHS == {"/", *(f"/static/{name}" for name in SOURCES if name != "index.html")}
    for path in PAGE_PATHS:
        name = path.rpartition("/")[2] or "index.html"
        reply = server.get(path)
        assert reply.status == 200 and reply.body.decode() == SOURCES[name]
        assert reply.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
        assert {header: reply.headers[header] for header in HEADERS} == HEADERS
        head = server.request("HEAD", path)
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["content-length"]) == len(reply.body)


def test_S36_no_other_path_is_a_file(server):
    assert {route.path for route in PAGE_ROUTES} == PAGE_PATHS  # exact ones, without parameters
    assert not PAGE_PATHS & {route.path for route in ROUTES}
    for path in ("/static/", "/static/../page.py", "/static/index.html", "/static/%2e%2e/page.py"):
        assert server.get(path).status == 404
    assert server.post("/", {}).status == 405


def test_the_page_can_be_left_out(start):
    server = start("--no-webui").listening()
    assert {server.get(path).status for path in PAGE_PATHS} == {404}
    assert server.get("/health/live").status == 200


def test_the_page_needs_no_key_and_what_it_asks_for_does(tight):
    for path in PAGE_PATHS:
        assert tight.request("GET", path, headers={"Authorization": ""}).status == 200
    for path in ("/metrics", "/v1/models", "/load"):
        assert tight.request("GET", path, headers={"Authorization": ""}).status == 401


def test_S36_nothing_from_elsewhere_and_nothing_inline():
    policy = dict(
        part.strip().partition(" ")[::2] for part in HEADERS["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
    html = SOURCES["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?! [^>]*src=)", html)
    for name, text in SOURCES.items():
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|@import|url\(|//cdn", text), name


def test_S36_no_way_from_text_to_html():
    for name, text in SCRIPTS.items():
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\("
            r"|createContextualFragment|setTimeout\(['\"`]|\.href|\.src\b|localStorage|cookie",
            text,
        )
        assert found is None, f"{name}: {found}"


def test_every_file_is_used_and_every_id_exists():
    html = SOURCES["index.html"]
    used = set(re.findall(r"static/([\w.]+)", html)) | {"index.html"}
    for text in SCRIPTS.values():
        used |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert used == set(SOURCES)
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    asked = set()
    for name in ("page.js", "panel.js"):
        asked |= set(re.findall(r'(?:byId|_byId|_set|on)\("([\w-]+)"', SOURCES[name]))
    assert asked and asked <= set(ids)
    assert set(re.findall(r'for="([\w-]+)"', html)) <= set(ids)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme):
    """WCAG's contrast of 4.5 for text."""
    light, dark = re.findall(r":root \{(.*?)\}", SOURCES["page.css"], re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark))
    pairs = [
        *itertools.product(("text", "faint"), ("page", "surface")), ("text", "mine"),
        ("on-accent", "accent"), ("error", "error-surface"), ("error", "surface"),
    ]  # fmt: skip
    for front, back in pairs:
        bright, dim = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, front, back)


# ---- in a browser ----


class Page:
    """The page in one tab of Chromium."""

    def __init__(self, driver, waiting):
        self.driver = driver
        self._waiting = waiting

    def open(self, server, width=1200, height=800, scheme="light"):
        """Of a server, in a tab that knows nothing of earlier tests."""
        command = self.driver.execute_cdp_cmd
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.switch_to.new_window("tab")
        old, new = self.driver.window_handles
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)
        command("Emulation.setDeviceMetricsOverride", metrics)
        command("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.get(f"http://{server.host}:{server.port}/")
        self.driver.get_log("browser")
        return self

    def endless(self):
        """Every answer goes on until someone stops it: a busy browser may miss a story's end."""
        self.run(
            "const real = window.fetch; window.fetch = (path, options) => real(path, options?.body"
            " ? { ...options, body: options.body.replace(/}$/, ', \"ignore_eos\": true}') }"
            " : options)"
        )

    def run(self, script, *arguments):
        """The value of some JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.one(selector).text

    def shown(self, selector):
        return any(one.is_displayed() for one in self.all(selector))

    def wait(self, condition, timeout=50):
        self._waiting(condition, timeout, lambda: self.text("body"))

    def send(self, text, wait=True):
        self.one("#message").send_keys(text + "\n")
        self.wait(lambda: self.shown(".assistant"))
        if wait:
            self.idle()

    def idle(self):
        """Wait until no answer comes any more."""
        self.wait(lambda: self.shown("#send"))

    def set(self, **fields):
        for name, value in fields.items():
            self.one(f"#{name}").clear()
            self.one(f"#{name}").send_keys(str(value))

    def answers(self):
        return [one.text for one in self.all(".assistant .text")]

    def complaints(self):
        """What the browser's console says, requests that were refused left out."""
        entries = self.driver.get_log("browser")
        return [one for one in entries if "Failed to load resource" not in one["message"]]


@pytest.fixture(scope="module")
def _driver(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def page(_driver, waiting):
    """A tab; nothing of what it does may break the page's own policy."""
    made = Page(_driver, waiting)
    yield made
    assert not made.complaints()


@in_browser
def test_ask_and_be_answered(page, server):
    page.open(server).wait(lambda: page.text("#state") == "ready")
    page.wait(lambda: page.text("#model") == "pace-nb-demo" and page.text("#running") == "0")
    assert page.shown("#empty") and not page.shown("#key-form")
    assert page.text("#context") == "1024"
    page.set(temperature=0, max_tokens=30)
    page.send(STORY)
    expected = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": STORY}], "temperature": 0, "max_tokens": 30},
    ).json()["choices"][0]["message"]["content"]
    assert page.answers() == [expected.strip()]
    assert page.text(".user .text") == STORY and not page.shown("#empty")
    assert re.fullmatch(
        r"30 tokens · [\d.]+ tokens/s · first after [\d.]+ s", page.text(".assistant .figures")
    )
    assert page.text(".assistant .note") == "Ended at the limit of tokens."
    assert page.one("#spoken").get_property("textContent") == f"Answer: {expected}"
    assert page.run("return document.activeElement.id") == "message"


@in_browser
def test_a_conversation_goes_on(page, server):
    """What the model is sent is the whole of it."""
    page.open(server).set(temperature=0, max_tokens=20, system="Be brief.")
    page.send(STORY)
    page.send("And then?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": STORY},
        {"role": "assistant", "content": json.loads(stored(page, "conversation"))[1]["content"]},
        {"role": "user", "content": "And then?"},
    ]
    body = {"messages": messages, "temperature": 0, "max_tokens": 20}
    expected = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert page.answers()[1] == expected.strip()
    page.one("#new-chat").click()
    assert page.answers() == [] and page.shown("#empty")


def stored(page, name):
    return page.run("return sessionStorage.getItem(arguments[0])", f"pace_nb.{name}")


@in_browser
def test_an_answer_streams_and_can_be_stopped(page, slow):
    page.open(slow).wait(lambda: page.text("#state") == "ready")
    page.endless()
    page.send(STORY, wait=False)
    lengths = []
    page.wait(lambda: lengths.append(len(page.text(".assistant .text"))) or len(set(lengths)) > 3)
    assert lengths == sorted(lengths) and page.shown("#stop") and not page.shown("#send")
    assert "tokens/s" in page.text(".assistant .figures")
    page.one("#stop").click()
    page.idle()
    assert page.text(".assistant .note") == "Stopped."
    text = page.answers()
    slow.idle()  # the server has let go of it
    assert page.answers() == text and text[0]
    assert slow.metric("client_disconnects_total") >= 1
    page.send("Go on.", wait=False)
    page.wait(lambda: len(page.answers()) == 2 and page.answers()[1])
    page.one("#message").send_keys("\ue00c")  # Escape
    page.idle()
    assert page.all(".assistant .note")[-1].text == "Stopped."


@in_browser
def test_a_long_prompt_says_how_far_it_is(page, slow):
    page.open(slow).set(max_tokens=2)
    page.run("arguments[0].value = arguments[1]", page.one("#message"), "A dog ran. " * 30)
    seen = set()
    page.send("", wait=False)
    page.wait(lambda: seen.add(page.text(".assistant .prefill")) or page.shown("#send"))
    told = [re.fullmatch(r"Reading the prompt: (\d+) of (\d+) tokens", one) for one in seen]
    done = sorted(int(one[1]) for one in told if one)
    assert len(done) > 1 and done[-1] < int(next(one for one in told if one)[2])
    assert not page.shown(".assistant .prefill") and page.answers()[0]


@in_browser
def test_the_engine_is_seen_at_work(page, slow):
    """The page looks again by itself, while it is open and nobody touches it."""
    page.open(slow).wait(lambda: page.text("#running") == "0")
    looks = page.run(
        "window.looks = 0; new PerformanceObserver((list) => { for (const one of list.getEntries())"
        " window.looks += one.name.endsWith('/metrics') }).observe({ type: 'resource' });"
        " return window.looks"
    )
    assert looks == 0
    connection, response = slow.open_stream(max_tokens=900, ignore_eos=True)
    assert response.status == 200, response.read()  # 2000 tokens would be refused
    page.wait(lambda: page.text("#running") == "1")
    assert page.text("#kv").endswith("%") and page.text("#waiting") == "0"
    page.wait(lambda: page.text("#throughput") not in ("–", "0.0"))
    response.close()
    connection.close()
    page.wait(lambda: page.text("#running") == "0" and page.text("#throughput") == "0.0")
    assert page.run("return window.looks") >= 3


@in_browser
def test_what_the_panel_makes_of_metrics(page, server):
    """Two engines, another prefix, and speculation, which appears when its metric does."""
    page.open(server)
    show = """
        const [text, done] = [arguments[0], arguments[1]];
        import("./static/panel.js").then(({ Panel }) => {
          const panel = new Panel((id) => document.getElementById(id));
          panel.show(text, 1000);
          panel.show(text.replace("total{engine=\\"0\\"} 100", "total{engine=\\"0\\"} 150"), 3000);
          done(Object.fromEntries([...document.querySelectorAll("#engine dd[id]")].map(
            (one) => [one.id, one.closest("div").hidden ? null : one.textContent])));
        });
    """
    engines = "".join(
        f'vllm:{name}{{engine="{i}",model_name="a}} 9"}} {value}\n'
        for name, values in [("num_requests_running", (3, 4)), ("num_requests_waiting", (0, 5)),
                             ("kv_cache_usage_perc", (0.5, 0.75)), ("engine_up", (1, 0))]
        for i, value in enumerate(values)
    )  # fmt: skip
    engines += 'vllm:generation_tokens_total{engine="0"} 100\n# HELP vllm:engine_up 1 or 0\n'
    found = self_async(page, show, engines)
    assert found["running"] == "7" and found["waiting"] == "5" and found["kv"] == "63 %"
    assert found["engines"] == "1 of 2" and found["throughput"] == "25"
    assert found["acceptance"] is None
    drafts = (
        "x:spec_decode_num_draft_tokens_total 200\nx:spec_decode_num_accepted_tokens_total 150\n"
    )
    assert self_async(page, show, drafts)["acceptance"] == "75 %"


@in_browser
def test_how_many_guesses_hold_is_seen(page, drafting, server):
    page.open(drafting).wait(lambda: page.text("#running") == "0")
    assert page.shown("#acceptance-row")
    page.set(temperature=0, max_tokens=60)
    page.send(STORY)
    page.wait(lambda: re.fullmatch(r"[\d.]+ %", page.text("#acceptance")))
    page.open(server).wait(lambda: page.text("#running") == "0")
    assert not page.shown("#acceptance-row")


def self_async(page, script, *arguments):
    return page.driver.execute_async_script(script, *arguments)


@in_browser
def test_regenerate_makes_the_last_answer_again(page, server):
    page.open(server).set(temperature=1, seed=1, max_tokens=30)
    page.send(STORY)
    page.send("Tell me a story about a dog.")
    first = page.answers()
    assert len([one for one in page.all(".regenerate") if one.is_displayed()]) == 1
    page.all(".regenerate")[-1].click()
    page.wait(lambda: len(page.answers()) == 2 and page.answers()[1])
    page.idle()
    assert page.answers() == first  # the same seed
    page.set(seed=2)
    page.all(".regenerate")[-1].click()
    page.idle()
    again = page.answers()
    assert again[0] == first[0] and again[1] != first[1] and len(page.all(".message")) == 4


@in_browser
def test_the_conversation_survives_a_reload(page, server):
    page.open(server).set(temperature=0.5, seed=7, max_tokens=20)
    page.send(STORY)
    before = [one.text for one in page.all(".message")]
    page.driver.refresh()
    assert [one.text for one in page.all(".message")] == before
    assert page.one("#temperature").get_property("value") == "0.5"
    page.all(".regenerate")[-1].click()
    page.idle()
    assert page.answers()[0] in before[1]


@in_browser
def test_a_reload_in_the_middle_keeps_what_has_come(page, slow):
    page.open(slow).endless()
    page.send(STORY, wait=False)
    page.wait(lambda: len(page.text(".assistant .text")) > 20)
    begun = page.text(".assistant .text")
    page.driver.refresh()
    assert page.text(".assistant .text").startswith(begun)
    assert page.text(".assistant .note") == "Ended when the page was loaded again."
    slow.idle()


@in_browser
def test_a_key_is_asked_for(page, tight):
    page.open(tight).wait(lambda: page.shown("#key-form"))
    assert page.text("#key-note").startswith("It is kept in this tab")
    page.one("#key").send_keys("wrong\n")
    page.wait(lambda: page.text("#key-note") == "The server does not accept this API key.")
    page.send(STORY)
    assert page.text(".assistant .error") == "The server does not accept this API key."
    page.one("#key").clear()
    page.one("#key").send_keys("secret\n")
    page.wait(lambda: not page.shown("#key-form") and page.text("#model") == "tight")
    page.set(max_tokens=5)
    page.all(".regenerate")[-1].click()
    page.wait(lambda: page.answers() != [""])
    page.idle()
    assert not page.shown(".error")
    page.driver.refresh()
    page.wait(lambda: page.text("#model") == "tight")  # the key is still there, in this tab
    assert stored(page, "key") == "secret" and not page.shown("#key-form")
    assert page.run("return localStorage.length + document.cookie.length") == 0
    page.open(tight).wait(lambda: page.shown("#key-form"))  # and in no other
    assert stored(page, "key") is None


@in_browser
def test_errors_are_told_in_words(page, server, start):
    page.open(server).set(max_tokens=5000)
    page.send(STORY)
    assert page.text(".assistant .error").startswith(
        "This model's maximum context length is 1024 tokens."
    )
    page.set(max_tokens=-1)
    page.send("x", wait=False)
    assert not page.one("#settings").get_property("validationMessage")
    assert len(page.all(".user")) == 1  # it was not sent: the field is marked
    assert page.run("return document.activeElement.id") == "max_tokens"
    other = start().listening()
    page.open(other)
    other.stop()
    page.send(STORY)
    assert page.text(".assistant .error") == "The server cannot be reached. Is it still running?"
    page.wait(lambda: page.text("#state") == "not reachable")


@in_browser
def test_S36_what_a_model_says_stays_text(page, server):
    evil = (
        "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>\n\n"
        "[click](javascript:alert(1)) ![i](http://evil.example/x.png) <svg onload=alert(1)>\n\n"
        "# <b>head</b>\n\n```html\n<iframe src=javascript:alert(1)></iframe>\n```\n"
        "**<i>x</i>** `<a>`"
    )
    page.open(server)
    page.run(
        "sessionStorage.setItem('pace_nb.conversation', arguments[0])",
        json.dumps(
            [
                {"role": "user", "content": evil},
                {"role": "assistant", "content": evil, "reasoning": evil, "note": evil,
                 "error": evil, "figures": evil},
            ]
        ),
    )  # fmt: skip
    page.run("history.replaceState(null, '', '#<img src=x onerror=alert(1)>')")
    # pagehide saves the conversation that the page has, so it is given none to save over ours
    page.run("addEventListener('pagehide', (e) => e.stopImmediatePropagation(), true)")
    self_async(
        page,
        """
        const [text, done] = [arguments[0], arguments[1]];
        import("./static/prose.js").then(({ write }) => {
          write(document.getElementById("empty"), text);
          done();
        });
        """,
        evil,
    )
    allowed = {"P", "PRE", "CODE", "STRONG"}
    names = page.run("return [...document.querySelectorAll('#empty *')].map((e) => e.tagName)")
    assert set(names) == allowed and "owned" not in page.driver.title
    assert page.text("#empty code").strip() in evil and "onerror" in page.text("#empty")
    assert not page.all("main a, main img, main svg, main iframe, main script")
    # and where the code had a hole, the browser's policy is there
    refused = page.run("try { document.body.innerHTML = '<b>'; } catch (e) { return e.name }")
    assert refused == "TypeError"
    assert any("TrustedHTML" in one["message"] for one in page.complaints())


@in_browser
@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_overflows(page, server, width):
    page.open(server, width, 640).send("W" * 300 + " and a story")
    assert page.run("return document.documentElement.scrollWidth") == width
    assert page.run("return document.documentElement.scrollHeight") == 640
    hidden = page.run(
        """
        return [...document.querySelectorAll("header *, main *")]
          .filter((e) => e.checkVisibility() && !e.closest(".unseen, pre"))
          .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
          .map((e) => e.outerHTML.slice(0, 60));
        """
    )
    assert hidden == []
    if width < 900:
        assert not page.shown("#side")
        page.one("#toggle-side").click()
        assert page.shown("#temperature")
        assert page.one("#toggle-side").get_attribute("aria-expanded") == "true"


@in_browser
def test_every_control_has_a_name(page, server):
    page.open(server).send("Hi")
    controls = [one for one in page.all("button, input, textarea, meter") if one.is_displayed()]
    assert len(controls) >= 10
    assert not [one.get_attribute("outerHTML") for one in controls if not one.accessible_name]
    roles = {"#conversation": "log", "#side": "complementary", "main": "main", "#state": "status"}
    assert {selector: page.one(selector).aria_role for selector in roles} == roles

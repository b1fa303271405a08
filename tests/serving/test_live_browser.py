"""The live page in Chromium, decoding with the reference model.

With EXPERTSHARE_SCREENSHOTS=DIR the pictures of docs/live-page.md are written there.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium", reason="the extra `browser` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from expertshare.api import generate
from expertshare.api.serving import opened_engine
from expertshare.models import LoadedModel, load_model
from expertshare.serving import ServerSettings, create_app, page_routes
from expertshare.serving.live import Event, LiveLimits, ModelTraceSource, page_paths

from .live import StubSource, served, serving

pytestmark = pytest.mark.browser

MODEL = Path(__file__).parents[2] / "models" / "reference"
PROMPT = "Write g(a) that returns a modulo 46. Then write f(data) that returns g of each of data."
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
FINISHED = "return Promise.all(document.getAnimations().map((one) => one.finished.catch(() => null))).then(() => 1)"
TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def port(loaded: LoadedModel) -> Iterator[int]:
    with served(ModelTraceSource(loaded, lock=threading.Lock())) as port:
        yield port


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in the browser, as somebody uses it."""

    def __init__(self, driver: webdriver.Chrome, port: int) -> None:
        self.driver, self.port = driver, port

    def open(self, *, width: int = 1280, height: int = 1330, dark: bool = False) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # what came before is not this page's
        self.driver.get(f"http://127.0.0.1:{self.port}/")
        self.until_status("Ready.")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def until(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def until_status(self, text: str) -> None:
        self.until(lambda: self.text("#status") == text)

    def write(self, prompt: str, *, writes: str = "2", pace: str = "0") -> None:
        self.find("#prompt").clear()
        self.find("#prompt").send_keys(prompt)
        Select(self.find("#writes")).select_by_value(writes)
        Select(self.find("#pace")).select_by_value(pace)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def script(self, text: str) -> Any:
        return self.driver.execute_script(text)

    def counters(self, side: str) -> dict[str, str]:
        found = self.driver.find_elements(By.CSS_SELECTOR, f"#half-{side} [data-counter]")
        return {str(counter.get_attribute("data-counter")): counter.text for counter in found}

    def complaints(self) -> list[dict[str, Any]]:
        """What the console holds."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")
        return entries

    def hosts_asked(self) -> set[str]:
        """Over any network; the browser's own first page, which may still be loading, asks none."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        parts = [urlsplit(url) for url in urls]
        return {part.netloc for part in parts if part.scheme not in ("chrome", "chrome-untrusted", "data")}

    def picture(self, name: str) -> None:
        directory = os.environ.get("EXPERTSHARE_SCREENSHOTS")
        if directory:
            assert self.driver.save_screenshot(str(Path(directory) / name))


@pytest.fixture
def page(chromium: webdriver.Chrome, port: int) -> Page:
    return Page(chromium, port)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_prompt_is_decoded_under_two_policies(page: Page, loaded: LoadedModel, theme: str) -> None:
    page.open(dark=theme == "dark")
    below = page.script("return document.querySelector('.comparison').getBoundingClientRect().top")
    page.write(PROMPT)
    page.find("#prompt").send_keys(Keys.ENTER)
    page.until_status("Done.")
    assert page.script("return document.querySelector('.comparison').getBoundingClientRect().top") == below
    for side, policy in (("a", "vanilla"), ("b", "des-vote")):
        alone = generate(loaded, PROMPT, policy=policy, gen_length=64, threshold=None, steps_per_block=16)
        answer, counters, megabytes = alone.answers[0], page.counters(side), sum(alone.cost.expert_bytes.values()) / 1e6
        assert page.text(f"#half-{side} .policy") == policy
        assert page.script(f"return document.querySelector('#half-{side} .answer').textContent") == answer.text
        assert counters["steps"] == str(alone.run.steps)
        assert counters["unique"] == f"{alone.cost.unique_experts['denoise']:.1f}"
        assert counters["bytes"] == f"{megabytes:.1f} MB"
        assert counters["tokens-of"] == f"{len(answer.token_ids)} tokens"
        assert float(counters["speed"].replace(",", "")) > 0
    ratios = [cell.text for cell in page.driver.find_elements(By.CSS_SELECTOR, ".ratio")]
    assert ratios[3:] == [f"1.00 {TIMES}"] * 2
    assert all(0.2 < float(ratio.removesuffix(TIMES)) < 0.5 for ratio in ratios[:2])
    assert page.text("#verdict").endswith("Both give the same answer.")
    assert page.complaints() == []
    assert page.hosts_asked() == {f"127.0.0.1:{page.port}"}
    page.script("document.activeElement.blur()")
    page.script(FINISHED)
    page.picture(f"live-{theme}-end.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_blocks_move_side_by_side(page: Page, theme: str) -> None:
    page.open(dark=theme == "dark")
    page.write(PROMPT, pace="120")
    page.find("#start").click()
    page.until(lambda: all("in block 2" in page.counters(side)["block-of"] for side in "ab"))
    page.until(lambda: page.counters("b")["block-of"].startswith(("6", "7")))
    page.picture(f"live-{theme}.png")
    masked = page.script("return document.querySelectorAll('#half-a .cell.masked').length")
    assert 0 < masked < 32
    assert page.text("#half-a .state") == page.text("#half-b .state") == "block 2"
    lit = page.find("#half-b .heat").get_attribute("aria-label")
    assert lit.startswith("Experts used in this step, by layer: ")
    page.press(Keys.ESCAPE)
    page.until_status("Stopped.")


def test_everything_can_be_reached_and_done_by_keyboard(page: Page) -> None:
    page.open()
    reached = []
    for _ in range(13):
        page.press(Keys.TAB)
        reached.append(page.script("return document.activeElement.id || document.activeElement.className"))
        outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
    form = ["policy-a", "policy-b", "tokens", "seed", "writes", "pace", "start"]
    assert [name for name in reached if name] == ["skip", "theme", "prompt", *form]
    page.script("document.getElementById('pace').value = '400'")
    page.press(Keys.ENTER)  # on Start
    page.until(lambda: page.script("return document.activeElement.id") == "stop")
    page.press(Keys.ESCAPE)
    page.until_status("Stopped.")
    assert page.script("return document.activeElement.id") == "start"
    Select(page.find("#pace")).select_by_value("0")
    page.find("#seed").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until_status("Done.")
    assert page.complaints() == []


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    page.open(dark=True)
    shade = "return getComputedStyle(document.body).backgroundColor"
    dark = page.script(shade)
    page.find("#theme").click()
    assert page.text("#theme") == "Theme: light"
    light = page.script(shade)
    assert light != dark
    page.open(dark=True)
    assert page.script(shade) == light  # remembered
    page.find("#theme").click()
    assert (page.text("#theme"), page.script(shade)) == ("Theme: dark", dark)
    page.find("#theme").click()
    page.open(dark=False)
    assert (page.text("#theme"), page.script(shade)) == ("Theme: system", light)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_screen_needs_no_scrolling_sideways(page: Page, width: int) -> None:
    page.open(width=width)
    page.write(PROMPT)
    page.find("#prompt").send_keys(Keys.ENTER)
    page.until_status("Done.")
    assert page.script("return document.documentElement.scrollWidth") <= width


def test_reduced_motion_is_honoured(page: Page) -> None:
    page.open()
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.find("#prompt").send_keys(Keys.ENTER)
    page.until(lambda: page.script("return document.querySelectorAll('.cell.fresh').length") > 0)
    assert page.script("return document.getAnimations().length") == 0
    page.until_status("Done.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("#prompt", "", "Write a prompt first"), ("#tokens", "9999", "1..256"), ("#seed", "-1", "Seed must be")],
)
def test_a_wrong_field_is_said_and_focused(page: Page, field: str, value: str, message: str) -> None:
    page.open()
    page.find(field).clear()
    page.find(field).send_keys(value, Keys.CONTROL, Keys.ENTER)
    assert message in page.text("#error")
    assert page.find(field).get_attribute("aria-invalid") == "true"
    assert f"#{page.script('return document.activeElement.id')}" == field


def test_what_the_server_refuses_is_shown(page: Page) -> None:
    page.open()
    page.script("document.getElementById('prompt').value = 'apple '.repeat(660)")
    page.find("#prompt").send_keys(Keys.ENTER)
    page.until(lambda: "positions" in page.text("#error"))
    assert page.find("#start").is_enabled()


def test_where_the_server_wants_a_key_the_page_asks_for_it(chromium: webdriver.Chrome, loaded: LoadedModel) -> None:
    with opened_engine(loaded) as engine:
        routers, settings = [page_routes(engine)], ServerSettings(api_key="right")
        with serving(create_app(engine, settings, extra_routers=routers, open_paths=page_paths())) as port:
            page = Page(chromium, port)
            chromium.get(f"http://127.0.0.1:{port}/")
            page.until(lambda: page.script("return document.activeElement.id") == "key")
            assert "API key" in page.text("#error")
            page.find("#key").send_keys("wrong", Keys.ENTER)
            page.find("#key").clear()
            page.find("#key").send_keys("right", Keys.ENTER)
            page.until_status("Ready.")
            page.find("#prompt").send_keys(Keys.ENTER)
            page.until_status("Done.")
            assert not page.find("#error").is_displayed()


def test_text_of_the_model_stays_text(chromium: webdriver.Chrome) -> None:
    evil = "<img src=x onerror='document.title=1'>"

    def script() -> Iterator[Event]:
        model = {
            "name": evil,
            "family": "stub",
            "num_parameters": 1,
            "num_moe_layers": 2,
            "num_experts": 4,
            "experts_per_token": 1,
            "block_length": 2,
            "threshold": 0.9,
            "temperature": 0.0,
            "whole_canvas": False,
        }
        yield {"type": "start", "model": model}
        token = {"text": evil, "masked": False, "confidence": 0.5, "role": "answer"}
        for run in range(2):
            counts = {"unique_experts": 1.0, "expert_bytes": 9, "expert_bytes_so_far": 9, "elapsed_s": 0.1}
            yield {
                "type": "step",
                "run": run,
                "block": 0,
                "step": 0,
                "steps": 1,
                "tokens": [token] * 2,
                "experts": [[0], [3]],
                "tokens_so_far": 2,
                **counts,
            }
            yield {"type": "block", "run": run, "block": 0, "answer": evil, "finish_reason": None}
        yield {"type": "error", "message": evil}

    source = StubSource(script=script, model=next(script())["model"])
    source.allow()
    with served(source, LiveLimits(policies=("vanilla", "skip"), examples=(evil,))) as port:
        page = Page(chromium, port)
        page.open()
        page.find("#start").click()
        page.until(lambda: page.text("#error") == evil)
        for side in "ab":  # what came before the error is shown
            assert page.text(f"#half-{side} .answer") == evil
            assert page.text(f"#half-{side} .state") == "broken off"
            assert evil in page.find(f"#half-{side} .cell").get_attribute("textContent")
        assert page.script("return document.querySelectorAll('main img').length") == 0
        assert page.driver.title == "expertshare live"

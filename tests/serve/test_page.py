"""The page in a browser: headless Chromium, whose microphone is a file."""

import base64
import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.result import streamed_text
from tests.serve.conftest import RATE, noise, serving, speech, wav

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
expect = playwright.expect
expect.set_options(timeout=90000)  # of a machine with much to do
MICROPHONE = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    heard = tmp_path_factory.mktemp("microphone") / "heard.wav"
    soundfile.write(heard, speech(10.0, seed=3), RATE, subtype="PCM_16")
    # root, as in containers, has no sandbox
    arguments = [*MICROPHONE, f"--use-file-for-fake-audio-capture={heard}", "--no-sandbox"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; nothing in it may fail, be refused by its own policy, or come from elsewhere."""
    contexts, complaints = [], []

    def open_page(running, init=None, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(90000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("request", lambda sent: sent.url.startswith((running.url, "blob:")) or complaints.append(sent.url))
        if init:
            page.add_init_script(init)
        page.goto(running.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # what a test has a server refuse, the browser reports too
    assert not [text for text in complaints if not re.search("status of 4|Unexpected response code: 4", text)]


class Spy:
    """What a page has sent over a WebSocket."""

    def __init__(self):
        self.samples = np.zeros(0, dtype=np.int16)

    def sent(self, text):
        message = json.loads(text)
        if message["type"] == "input_audio_buffer.append":
            new = np.frombuffer(base64.b64decode(message["audio"]), dtype="<i2")
            self.samples = np.concatenate([self.samples, new])


def spied(page):
    spy = Spy()
    page.on("websocket", lambda socket: socket.on("framesent", spy.sent))
    return spy


def wait_until(page, what, seconds=90):
    for _ in range(round(10 * seconds)):
        if what():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it has not come")


def captions(page):
    return page.locator("#captions p").all_text_contents()


def heard(recognizer, samples):
    """The captions of a stream that begins and ends with these samples."""
    stream = recognizer.open("en")
    words = [*stream.accept(samples.astype(np.float32) / 32768), *stream.finish()]
    return [streamed_text(list(said)).strip() for _, said in groupby(words, lambda word: word.segment)]


@pytest.fixture
def segments_server(speech_llm):
    with serving(speech_llm) as running:
        yield running


def listen(page, spy, seconds):
    """Press the button, hear so much, press it again."""
    button = page.get_by_role("button", name="Start listening")
    expect(button).to_be_enabled()
    button.press("Enter")
    wait_until(page, lambda: len(spy.samples) > seconds * RATE)
    page.get_by_role("button", name="Stop").press("Space")
    expect(button).to_be_visible()


def test_captions_are_the_words_of_what_was_heard(words_server, streaming, open_page):
    page = open_page(words_server)
    spy = spied(page)
    button = page.get_by_role("button", name="Start listening")
    expect(button).to_be_enabled()
    button.press("Enter")
    expect(page.locator("#live-status")).to_have_text("Listening")
    expect(page.locator("#captions p.partial")).to_be_visible()
    expect(page.locator("#delay")).to_have_text(re.compile(r"^Delay \d+\.\d s$"))
    wait_until(page, lambda: page.locator("#level").evaluate("meter => meter.value") > 0.3)
    wait_until(page, lambda: len(spy.samples) > 6 * RATE)
    page.get_by_role("button", name="Stop").press("Space")
    expect(page.locator("#live-status")).to_have_text("Stopped")
    expected = heard(streaming, spy.samples)
    assert len(expected) > 1 and captions(page) == expected
    assert page.locator("#captions p.partial").count() == 0
    # a screen reader is told the captions when they are final, once
    announcer = page.locator("[aria-live=polite] p")
    assert announcer.all_text_contents() == expected


def test_captions_between_pauses_are_what_transcribe_gives(segments_server, speech_llm, open_page):
    page = open_page(segments_server)
    spy = spied(page)
    listen(page, spy, seconds=1.5)
    samples = spy.samples.astype(np.float32) / 32768
    (expected,) = speech_llm.transcribe([samples], "en", options=RecognizeOptions(timestamps=True))
    assert expected.text and " ".join(captions(page)) == expected.text


def test_words_say_their_confidence_to_pointer_and_keys(words_server, open_page):
    page = open_page(words_server, permissions=["clipboard-read", "clipboard-write", "microphone"])
    listen(page, spied(page), seconds=2)
    note, words = page.get_by_role("tooltip"), page.locator("#captions .word")
    expect(note).to_be_hidden()
    words.nth(0).hover()
    expect(note).to_have_text(re.compile(r"^\d+ % certain · \d+\.\d\d to \d+\.\d\d s$"))
    page.mouse.move(0, 0)
    expect(note).to_be_hidden()
    page.locator("#captions").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    expect(note).to_be_visible()
    expect(words.nth(1)).to_have_attribute("aria-describedby", "word-note")
    page.keyboard.press("Escape")
    expect(note).to_be_hidden()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Copy text").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "\n".join(captions(page))
    page.get_by_role("button", name="Clear").click()
    assert captions(page) == []


# All that is said of live captions from now on.
ERRORS = """() => {
    const place = document.getElementById("live-error");
    window.errors = [];
    new MutationObserver(() => window.errors.push(place.textContent)).observe(place, { childList: true });
}"""


def test_a_lost_connection_loses_nothing(words_server, streaming, open_page):
    """What was not completed is sent again: the samples of both connections overlap there, and have no gap."""
    page = open_page(words_server)
    spies, routes, completed, broken = [], [], [], []

    def route(socket):
        server, spy = socket.connect_to_server(), Spy()
        spies.append(spy)
        routes.append(socket)

        def to_server(text):
            spy.sent(text)
            server.send(text)

        def to_page(text):
            event = json.loads(text)
            if socket in broken:
                return
            if len(spies) == 1 and event["type"].endswith("transcription.completed"):
                completed.append(event)
            socket.send(text)

        socket.on_message(to_server)
        server.on_message(to_page)

    page.route_web_socket("**/v1/realtime*", route)
    page.reload()
    page.evaluate(ERRORS)
    page.get_by_role("button", name="Start listening").click()
    wait_until(page, lambda: completed and len(spies[0].samples) > (completed[-1]["end"] + 0.5) * RATE)
    broken.append(routes[0])
    routes[0].close(code=1011)
    wait_until(page, lambda: len(spies) == 2 and len(spies[1].samples) > RATE)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#live-status")).to_have_text("Stopped")
    lost = "The connection to the server was lost. Trying again in 1 s; what you say meanwhile is kept."
    assert page.evaluate("() => window.errors") == [lost, ""]
    first, second = (spy.samples for spy in spies)
    unwritten = first[round(completed[-1]["end"] * RATE) :]
    assert len(unwritten) and (second[: len(unwritten)] == unwritten).all()
    before = [event["transcript"] for event in completed if event["transcript"]]
    assert before and captions(page) == before + heard(streaming, second)


def test_a_key_is_asked_for_and_kept_in_the_tab_only(speech_llm, streaming, open_page):
    with serving(speech_llm, streaming, key="sk-right") as running:
        page = open_page(running)
        expect(page.get_by_role("alert").first).to_have_text("This server asks for an API key: enter it below.")
        field = page.get_by_label("Key of this server")
        field.fill("sk-wrong")
        field.press("Enter")
        expect(page.locator("#key-error")).to_have_text("The server does not take this key. Enter another one.")
        field.fill("sk-right")
        page.get_by_role("button", name="Use key").click()
        listen(page, spied(page), seconds=1)
        assert captions(page)
        page.set_input_files("#file", {"name": "a.wav", "mimeType": "audio/wav", "buffer": wav(noise(2, 1)).read()})
        expect(page.locator("#transcript .word").first).to_be_visible()
        assert page.evaluate("() => [localStorage.length, document.cookie, location.search]") == [0, "", ""]
        assert page.context.new_page().goto(running.url).ok  # another tab
        expect(page.context.pages[1].get_by_role("alert").first).to_have_text(re.compile("asks for an API key"))


def drop(page, name, content):
    """Drop a file somewhere on the page."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name));
            return transfer;
        }""",
        [name, base64.b64encode(content).decode()],
    )
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})


def test_a_file_that_is_dropped(words_server, speech_llm, open_page):
    page = open_page(words_server)
    samples = speech(8.0, seed=5)
    expect(page.locator("#file")).to_be_enabled()
    drop(page, "talk.wav", wav(samples).read())
    expect(page.locator("#recording-status")).to_have_text(re.compile(r"^talk.wav: 8.0 s of audio, transcribed in"))
    rounded = (samples * 32767).astype("<i2")
    (expected,) = speech_llm.transcribe([rounded], "en", options=RecognizeOptions(timestamps=True))
    lines = [segment.text for segment in expected.segments if segment.text]
    assert page.locator("#transcript p").all_text_contents() == lines
    words = [word for segment in expected.segments for word in segment.words or ()]
    shown = page.locator("#transcript .word")
    assert shown.all_text_contents() == [word.text for word in words]

    # it is to stay where it is sent, so that the places can be compared
    audio = page.locator("audio")
    audio.evaluate("audio => { audio.plays = 0; audio.play = async () => { audio.plays += 1; }; }")

    def goes_to(seconds, tolerance=1e-3):
        expected = pytest.approx(seconds, abs=tolerance)
        wait_until(page, lambda: audio.evaluate("audio => audio.currentTime") == expected)

    shown.nth(2).click()
    goes_to(words[2].start)
    expect(page.locator("#transcript [aria-current=true]")).to_have_text(words[2].text)
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    goes_to(words[-1].start)
    colors = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert page.locator("#overview").evaluate(colors) > 2 and page.locator("#detail").evaluate(colors) > 2
    page.locator("#overview").click(position={"x": 1, "y": 5})
    goes_to(0, tolerance=0.1)
    assert audio.evaluate("audio => audio.plays") == 3


def test_what_goes_wrong_is_said_where_it_does(speech_llm, streaming, open_page):
    denied = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); }"
    with serving(speech_llm, streaming, max_streams=1, max_upload_bytes=100000) as running:
        page = open_page(running)
        expect(page.locator("#file")).to_be_enabled()
        drop(page, "talk.wav", b"no audio at all")
        expect(page.locator("#recording-error")).to_have_text(re.compile("^talk.wav: "))
        drop(page, "long.wav", bytes(2 * 2**20))
        expect(page.locator("#recording-error")).to_have_text(re.compile("^long.wav has 2 MB; this server"))
        with running.connect() as other:
            other.events("session.created")
            page.get_by_role("button", name="Start listening").click()
            expect(page.locator("#live-error")).to_have_text(re.compile("^All places of the server are taken"))
        expect(page.locator("#live-status")).to_have_text("Listening")
        page = open_page(running, init=denied)
        page.get_by_role("button", name="Start listening").click()
        expect(page.locator("#live-error")).to_have_text(re.compile("Allow it for this page"))


RESAMPLE = """async ([rate, samples, block]) => {
    const { Resampler } = await import("./resample.js");
    const [resampler, found] = [new Resampler(rate, 16000), []];
    for (let i = 0; i < samples.length; i += block) {
        found.push(...resampler.push(Float32Array.from(samples.slice(i, i + block))));
    }
    return found;
}"""


def test_resampling_keeps_speech_and_folds_nothing_into_it(words_server, open_page):
    page = open_page(words_server)

    def tone(hertz, rate):
        return np.sin(2 * np.pi * hertz * np.arange(rate // 10) / rate)

    def resampled(hertz, rate, block=128):
        return np.array(page.evaluate(RESAMPLE, [rate, tone(hertz, rate).tolist(), block]))

    for rate in (16000, 44100, 48000):
        found = resampled(3000, rate)
        assert len(found) > 1550
        np.testing.assert_allclose(found[100:1500], tone(3000, 16000)[100:1500], atol=2e-3)
        np.testing.assert_allclose(resampled(3000, rate, block=1000)[: len(found)], found, atol=1e-6)
        if rate > 16000:
            assert abs(resampled(9000, rate)[100:]).max() < 2e-3


CONTRASTS = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = numbers(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return numbers(color)[3] === 0 && element.parentElement ? background(element.parentElement) : color;
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!hasText || element.disabled || !element.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(element).color), light(background(element))];
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML]);
    }
    return found;
}"""


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_is_read_and_used_on_a_phone_without_a_mouse(words_server, open_page, color_scheme):
    page = open_page(words_server, color_scheme=color_scheme, reduced_motion="reduce", **PHONE)
    page.get_by_role("button", name="Start listening").click()
    expect(page.locator("#captions .word").first).to_be_visible()
    contrasts = page.evaluate(CONTRASTS)
    assert page.locator("#listen").evaluate("element => getComputedStyle(element).animationName") == "none"
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#live-status")).to_have_text("Stopped")
    drop(page, "a.wav", wav(noise(3, 1)).read())
    expect(page.locator("#waveform")).to_be_visible()
    # as while something is wrong
    page.locator("#recording-error").evaluate("element => (element.textContent = 'Something')")
    contrasts += page.evaluate(CONTRASTS)
    assert len(contrasts) > 20 and not [found for found in contrasts if found[0] < 4.5]
    assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    controls = page.locator("button:visible, select:visible, .file-button, audio")
    sizes = [controls.nth(i).bounding_box()["height"] for i in range(controls.count())]
    assert len(sizes) > 5 and min(sizes) >= 44
    # names of all that can be reached, as a screen reader has them
    tree = page.locator("body").aria_snapshot()
    for role in ("button", "combobox", "meter", "group", "img", "heading"):
        named = re.findall(rf"- {role}(.*)", tree)
        assert named and all(re.match(r' "[^"]+"', name) for name in named), (role, tree)


def test_what_the_markup_promises():
    markup = (Path(__file__).parents[2] / "speechllm/serve/static/index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', markup)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'\b(?:for|aria-labelledby|aria-describedby)="([^"]+)"', markup)
    assert set(referred) <= set(ids)
    assert '<html lang="en">' in markup and markup.count("<h1") == 1
    # what the policy of the server does not allow
    assert not re.search(r'<script(?![^>]*\bsrc=)|<style|\bstyle="|\bon\w+="|https?://', markup)

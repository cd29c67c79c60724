"""The page of `mmv look` in a browser: what stands there is what the trace says."""

import json
import math
import re

import numpy as np
import pytest

import minimind_v as mmv
from minimind_v.core.pages.frame import ASSETS
from minimind_v.core.pages.microscope import microscope_page, write_microscope
from tests.cli import harness
from tests.cli.harness import SIGHT
from tests.pages.browser import open_browser


@pytest.fixture(scope="module")
def trace():
    _, vision, _, tokenizer = SIGHT
    model = mmv.load(harness.sighted(), vision_model=vision, tokenizer=tokenizer)
    return model.look("What do you see?", harness.tiny_data().picture(), answer=" red </script><b> 星", occlusion=True)


@pytest.fixture(scope="module")
def page_file(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("microscope") / "look.html"
    write_microscope(path, trace.as_json())
    return path


def test_the_page_is_one_file_whose_policy_allows_its_own_script_only(trace, page_file):
    text = page_file.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]+='", policy)
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    assert text.count("</script>") == 2, "an answer ended the script that holds it"
    data = json.loads(re.search(r'id="trace">(.*?)</script>', text, re.DOTALL)[1])
    assert data == json.loads(json.dumps(trace.as_json()))


def test_another_trace_gives_another_page(trace):
    assert microscope_page(trace.as_json()) != microscope_page(trace.as_json() | {"question": "Where?"})


def opened(page, page_file):
    page.goto(page_file.as_uri())
    page.wait_for_selector(".mmv-look .chip")
    return page.locator(".mmv-look")


def percent(value):
    return (
        "100 %" if value >= 0.9995 else "< 0.1 %" if value < 0.0005 else f"{math.floor(1000 * value + 0.5) / 10:.1f} %"
    )


def shown(text):
    """A token as the page shows it in a list."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return re.sub(r"^ +| +$", lambda spaces: "·" * len(spaces[0]), text)


@pytest.mark.long
def test_tokens_rivals_patches_and_variants_are_those_of_the_trace(trace, page_file):
    with open_browser() as page:
        viewer = opened(page, page_file)
        chips = viewer.locator(".chip")
        assert chips.count() == len(trace.tokens)
        total = sum(token.bits_blank - token.bits for token in trace.tokens)
        assert f"{abs(total):.1f}" in viewer.locator(".token .big").inner_text() or abs(total) < 10
        for index, token in enumerate(trace.tokens):
            chips.nth(index).click()
            viewer.locator(f".chip.lit[data-token='{index}']").wait_for()
            bars = viewer.locator(".token .bars li")
            texts = [token.text, *(rival.text for rival in token.rivals)]
            assert bars.locator(".word").all_text_contents() == list(map(shown, texts))
            values = [token.probability, *(rival.value for rival in token.rivals)]
            assert bars.locator(".value").all_text_contents() == list(map(percent, values))
            surprise = viewer.locator(".token .dim").first.inner_text()
            assert f"{token.bits:.2f}" in surprise or f"{token.bits:.1f}" in surprise
        box = viewer.locator(".pad").bounding_box()
        for patch in (0, 27, 63):
            row, column = divmod(patch, 8)
            page.mouse.click(box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8)
            page.get_by_role("heading", name=f"row {row + 1}, column {column + 1}").wait_for()
            card = viewer.locator(".patch")
            expected = trace.patches[patch]
            assert card.locator(".bars:not(.lens) .word").all_text_contents() == [
                word.text for word in expected.nearest
            ]
            assert card.locator(".lens .word").all_text_contents() == [shown(word.text) for word in expected.layers]
            lost = float(trace.occlusion[:, patch].sum())
            assert f"{abs(lost):.2f}" in card.locator(".big").inner_text()
        answers = viewer.locator(".others tbody td:nth-child(2)").all_text_contents()
        assert answers == [trace.answer, trace.variants["blank"].answer, trace.variants["swapped"].answer]
        assert page.errors == []


@pytest.mark.long
def test_the_map_shows_the_weights_of_the_chosen_layer_and_head(trace, page_file):
    with open_browser() as page:
        viewer = opened(page, page_file)
        viewer.locator(".chip").nth(1).click()
        for layer, head in ((None, None), (1, 2)):
            viewer.get_by_label("Layer").select_option(index=0 if layer is None else layer + 1)
            viewer.get_by_label("Head").select_option(index=0 if head is None else head + 1)
            weights = trace.attention[1].mean((0, 1)) if layer is None else trace.attention[1, layer, head]
            viewer.locator(".scale").get_by_text(percent(float(weights.max()))).wait_for()
        viewer.get_by_label("Map").select_option("rollout")
        viewer.locator(".scale").get_by_text(percent(float(trace.rollout[1].max()))).wait_for()
        viewer.get_by_label("Map").select_option("none")
        viewer.locator(".scale span").first.wait_for(state="detached")
        pixels = page.evaluate("""() => {
          const canvas = document.querySelector(".pad canvas"), context = canvas.getContext("2d");
          return Array.from({ length: 64 }, (_, at) => {
            const x = (at % 8 * 8 + 4.5) * canvas.width / 64, y = (Math.floor(at / 8) * 8 + 4.5) * canvas.height / 64;
            return [...context.getImageData(x, y, 1, 1).data.slice(0, 3)];
          });
        }""")
        image = trace.images[0].pixels
        expected = [image[:, at // 8 * 8 + 4, at % 8 * 8 + 4].tolist() for at in range(64)]
        assert np.abs(np.array(pixels) - expected).max() <= 2, "the image is not drawn as the model receives it"
        assert page.errors == []


@pytest.mark.long
def test_a_double_click_shows_what_each_token_loses_with_a_grey_patch(trace, page_file):
    with open_browser() as page:
        viewer = opened(page, page_file)
        box = viewer.locator(".pad").bounding_box()
        page.mouse.dblclick(box["x"] + box["width"] * 3.5 / 8, box["y"] + box["height"] * 3.5 / 8)
        painted = viewer.locator("tr.painted")
        painted.wait_for()
        change = float(trace.occlusion[:, 27].sum())
        text = painted.locator("td").last.inner_text().replace("−", "-")
        assert float(text) == pytest.approx(change, abs=0.0051)
        for patch in (trace.occlusion.sum(axis=0).argmax(), trace.occlusion.sum(axis=0).argmin()):
            lost = trace.occlusion[:, patch].sum()
            page.mouse.move(
                box["x"] + box["width"] * (patch % 8 + 0.5) / 8, box["y"] + box["height"] * (patch // 8 + 0.5) / 8
            )
            sentence = viewer.locator(".patch .big").inner_text()
            assert sentence.startswith(f"When this patch is grey, the answer {'loses' if lost >= 0 else 'gains'} ")
        viewer.get_by_role("button", name="Clear").click()
        painted.wait_for(state="detached")
        assert page.errors == []


@pytest.mark.long
def test_the_keyboard_reaches_tokens_patches_and_tables(trace, page_file):
    with open_browser() as page:
        viewer = opened(page, page_file)
        viewer.locator(".chip").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.dataset.token") == str(len(trace.tokens) - 1)
        viewer.locator(".pad").focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        page.get_by_role("heading", name="row 2, column 2").wait_for()
        assert trace.patches[9].nearest[0].text in viewer.locator("[aria-live]").inner_text()
        viewer.get_by_text("The numbers as tables").click()
        rows = viewer.locator("details table").first.locator("tbody tr")
        rows.first.wait_for()  # they are written when the tables have opened
        assert rows.count() == len(trace.tokens)
        assert page.errors == []


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1400])
def test_both_languages_and_themes_fit_a_phone_and_a_desk(page_file, width):
    for language, scheme, title in (("zh-CN", "dark", "看看回答的内部"), ("en-GB", "light", "Inside an answer")):
        settings = {"viewport": {"width": width, "height": 800}, "locale": language, "color_scheme": scheme}
        with open_browser(**settings, has_touch=width < 500) as page:
            viewer = opened(page, page_file)
            assert page.locator("h1").inner_text() == title
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            viewer.locator(".chip").nth(1).tap() if width < 500 else viewer.locator(".chip").nth(1).click()
            page.locator("#language").click()
            assert page.locator("h1").inner_text() != title
            assert page.errors == []


def test_both_languages_have_the_same_texts():
    text = (ASSETS / "look.js").read_text(encoding="utf-8")
    source = re.search(r"const TEXTS = (\{.*?\n\});", text, re.DOTALL)[1]
    english, chinese = source.split("\n  zh: {")
    keys = [re.findall(r"^    (\w+):", texts, re.MULTILINE) for texts in (english, chinese)]
    assert keys[0] == keys[1]
    assert len(keys[0]) > 40

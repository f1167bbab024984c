"""The report of a study, opened in a browser."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.conftest import make_model
from tests.web.browser import chromium, open_page, wait_until
from tests.web.conftest import HOSTILE
from tests.web.studies import ODD, Invention
from topk_megatron.analysis.promoted import read_directions
from topk_megatron.analysis.study import open_run
from topk_megatron.errors import AnalysisError
from topk_megatron.web.report import ReportConfig, write_report
from topk_megatron.web.report import command as report_command

SIZE = 2 * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of a TopK LM with H = 32."""
    return make_model(tmp_path_factory.mktemp("topk"), layers=(0, 1), seed=0, iteration=200)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Everything but SAEs measured, of a model that exists."""
    path = tmp_path_factory.mktemp("study")
    invention = Invention(path, layers=2, width=32, vocab=96, model=model)
    invention.record().entropy().track().steer()
    return path


@pytest.fixture(scope="module")
def report(study: Path) -> Path:
    """Its report."""
    path = study / "report.html"
    write_report(ReportConfig(study, path))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened from disk."""
    with open_page(browser, f"file://{report}") as page:
        page.wait_for_selector("html[data-ready=all]")
        yield page


@pytest.fixture
def page(opened: Any) -> Any:
    """The open report without a search and in its first order."""
    opened.select_option("#sort", "count")
    opened.fill("#search", "")
    opened.locator("#controls").evaluate("(form) => form.requestSubmit()")
    opened.get_by_text("64 of 64 neurons").wait_for()
    return opened


def names(page: Any) -> list[str]:
    """Returns the visible rows of the list, from the top."""
    rows = page.locator("#list .row").all()
    return [row.locator(".name").inner_text() for row in sorted(rows, key=_place)]


def _place(row: Any) -> int:
    return int(row.get_attribute("data-place"))


def test_report_uses_no_network_and_runs_only_its_own_scripts(page: Any) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.reload()
    page.wait_for_selector("html[data-ready=all]")
    page.locator(".plot .main-svg").first.wait_for()
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), "
                  "{textContent: 'window.hacked = 2'}))")  # fmt: skip
    assert page.evaluate("window.hacked === undefined")


def test_no_plot_offers_to_upload_it(page: Any) -> None:
    bar = page.locator(".plot .modebar").first
    bar.wait_for(state="attached")
    titles = page.locator(".modebar-btn").evaluate_all(
        "(buttons) => buttons.map((one) => one.dataset.title || '')"
    )
    assert "Zoom in" in titles
    offers = re.compile("cloud|share|upload|chart studio|edit|plotly", re.IGNORECASE)
    assert [title for title in titles if offers.search(title)] == []


def test_claims_show_numbers_intervals_and_outcome_as_text(page: Any) -> None:
    text = page.locator("#claims").inner_text()
    assert "those of <b>the dense twin</b>" in text
    assert "3.1 bits [3, 3.2]" in text
    assert "-1.9 bits [-2.1, -1.7]" in text
    assert "holds" in text
    assert "tools/analyze.py sae was not run" in text


def test_tokens_that_are_markup_stay_text(page: Any) -> None:
    page.fill("#search", "<script>")
    page.get_by_text(re.compile(r"^\d of 64 neurons")).wait_for()
    page.locator("#list .row").first.click()
    card = page.locator("#card")
    card.locator(".examples").wait_for()
    assert HOSTILE in card.inner_text()
    assert page.locator("main script, main i, main b").count() == 0
    assert page.evaluate("window.hacked === undefined")


def test_search_by_number_measure_and_whole_token(page: Any, study: Path) -> None:
    page.fill("#search", "1:7")
    page.get_by_text("1 of 64 neurons").wait_for()
    assert names(page) == ["Layer 1, neuron 7"]
    counts = open_run(study, "topk").neurons["count"].to_pylist()
    page.fill("#search", "count>=2500")
    page.get_by_text(f"{sum(c >= 2500 for c in counts)} of 64 neurons").wait_for()
    page.fill("#search", '"quoted"')
    page.get_by_text("0 of 64 neurons", exact=True).wait_for()
    page.fill("#search", "quoted")
    page.get_by_text(re.compile(r"^[1-9]\d* of 64 neurons")).wait_for()
    assert all("quoted" in row.inner_text() for row in page.locator("#list .row").all())


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("9:1", "Layer 9 is not in this report; its layers are 0, 1."),
        ("0:32", "Neuron 32 is out of range"),
        ("sharpness<2", "There is no measure sharpness; there are count"),
    ],
)
def test_search_that_cannot_be_answered_says_why(page: Any, query: str, message: str) -> None:
    page.fill("#search", query)
    page.locator("#count.error").wait_for()
    assert message in page.locator("#count").inner_text()


@pytest.mark.parametrize("measure", ["count", "token_entropy", "formed_iteration", "steer_success"])
def test_sort_by_a_measure_puts_the_largest_first_and_the_unmeasured_last(
    page: Any, study: Path, measure: str
) -> None:
    from topk_megatron.web.shared.neuron_measures import collect_measures

    run = open_run(study, "topk")
    values = next(m for m in collect_measures(study, run) if m.key == measure).values.ravel()
    shown = values.tolist()
    expected = sorted(range(SIZE), key=lambda n: (shown[n] != shown[n], -shown[n], n))
    page.select_option("#sort", measure)
    titles = [f"Layer {n // 32}, neuron {n % 32}" for n in expected]
    found = names(page)
    assert found == titles[: len(found)]
    page.locator("#list").press("End")
    page.wait_for_selector(f"#row-{SIZE - 1}")
    assert names(page)[-1] == titles[-1]


def test_card_shows_every_part(page: Any, study: Path, model: Path) -> None:
    page.evaluate("location.hash = '#L0N3'")
    page.wait_for_selector("#card[data-neuron='3']")
    card = page.locator("#card")
    text = card.inner_text()
    assert card.locator(".examples li").count() == 8
    assert card.locator("mark.fired").count() == 8
    assert card.locator(".bars li").first.locator(".name").inner_text() == '␣"quoted"'
    assert "\N{MULTIPLICATION SIGN}50" in text
    assert card.locator("svg.line circle").count() == 2 * 4
    assert " or not <i>to</i> be" in card.locator(".pair").last.text_content()
    directions = read_directions(model, {"normalization": "RMSNorm"})
    token, effect = directions.top(3, 4, 1)[0][0][0]
    promoted = card.get_by_text("Promoted", exact=True).locator("xpath=..").locator(".chip").first
    texts = open_run(study, "topk").vocabulary["text"].to_pylist()
    assert texts[token].strip() in promoted.inner_text()
    assert f"+{effect:.3g}" in promoted.inner_text()


def test_keyboard_alone_opens_cards(page: Any) -> None:
    page.locator("#list").focus()
    for key in ("Home", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    chosen = page.locator("#list .row[aria-selected=true] .name").inner_text()
    page.locator("#card h2", has_text=chosen).wait_for()
    assert page.locator("#list").get_attribute("aria-activedescendant") == "row-1"


def test_neuron_that_never_fired_says_so(page: Any) -> None:
    page.evaluate("location.hash = '#L1N31'")
    page.wait_for_selector("#card[data-neuron='63']")
    assert "It never fired on this corpus." in page.locator("#card").inner_text()


def test_narrow_screen_does_not_scroll_sideways(browser: Any, report: Path) -> None:
    size = {"width": 390, "height": 844}
    with open_page(browser, f"file://{report}#L0N3") as page:
        page.set_viewport_size(size)
        page.wait_for_selector("html[data-ready=all]")
        page.wait_for_selector("#card[data-neuron='3']")
        # Plots take their new width a moment after the window does.
        wait_until(page, "document.documentElement.scrollWidth <= 390")


def test_study_of_a_recording_alone_shows_what_is_missing(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Invention(tmp_path, layers=1, width=8, vocab=20).record()
    parser = argparse.ArgumentParser()
    report_command.register(parser.add_subparsers())
    args = parser.parse_args(["report", "--study", str(tmp_path)])
    args.run(args)
    assert "report.html: topk, 8 neurons, 0 claims" in capsys.readouterr().out
    with open_page(browser, f"file://{tmp_path / 'report.html'}#L0N1") as page:
        page.wait_for_selector("html[data-ready=all]")
        text = page.locator("main").inner_text()
        assert "No claim was measured in this study." in text
        for command in ("entropy", "track", "steer", "sae"):
            assert f"tools/analyze.py {command} was not run" in page.locator("#plots").inner_text()
        assert "gone holds no config.json" in page.locator("#card").inner_text()


def test_refused_semantic_entropy_is_reported_with_its_reason(tmp_path: Path) -> None:
    Invention(tmp_path, layers=1, width=8, vocab=20).record().entropy(semantic=False)
    summary = write_report(ReportConfig(tmp_path, tmp_path / "report.html"))
    assert "no embedding model is installed" in summary["missing"]["semantic"]
    assert "semantic_entropy" not in [measure["key"] for measure in summary["measures"]]


def test_damaged_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="no finished run"):
        write_report(ReportConfig(tmp_path, tmp_path / "report.html"))
    Invention(tmp_path, layers=1, width=8, vocab=20).record()
    with pytest.raises(AnalysisError, match="has no run 'other'; recorded are: topk"):
        write_report(ReportConfig(tmp_path, tmp_path / "report.html", run="other"))
    examples = tmp_path / "runs" / "topk" / "examples.parquet"
    examples.write_bytes(examples.read_bytes()[:-9])
    with pytest.raises(AnalysisError, match=r"examples\.parquet is damaged"):
        write_report(ReportConfig(tmp_path, tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()


def test_data_in_a_report_are_never_markup(report: Path) -> None:
    text = report.read_text()
    blocks = re.findall(r'<script type="text/plain" id="([^"]+)">(.*?)</script>', text)
    assert {"summary", "vocabulary", "tops", "directions", "cards-0-0", "plotly"} <= {
        identity for identity, _ in blocks
    }
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]+", data) for _, data in blocks)
    assert json.dumps(ODD[0]) not in text

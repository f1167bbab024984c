"""The files that both pages are built from."""

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.web.shared.assets import EXPLORER, REPORT, Page, fill, linked, served

WEB = REPOSITORY / "topk_megatron" / "web"


def files_of(page: Page) -> tuple[str, ...]:
    return (page.template, *page.styles, *page.scripts)


def test_every_file_in_an_assets_folder_belongs_to_a_page() -> None:
    on_disk = {
        f"{path.parents[1].name}/{path.name}" for path in WEB.glob("*/assets/*") if path.is_file()
    }
    assert on_disk == {*files_of(REPORT), *files_of(EXPLORER)}


@pytest.mark.parametrize("page", [REPORT, EXPLORER], ids=["report", "explorer"])
def test_pages_share_what_is_in_the_shared_folder(page: Page) -> None:
    shared = {f"shared/{path.name}" for path in (WEB / "shared" / "assets").iterdir()}
    assert shared <= set(files_of(page))


def test_explorer_links_to_exactly_the_files_that_it_serves() -> None:
    html = linked(EXPLORER, "/static")
    assert html.count("/static/") == len(served(EXPLORER))
    assert all(f'"/static/{name}"' in html for name in served(EXPLORER))
    assert "<!--" not in html


def test_filled_parts_are_not_filled_again() -> None:
    parts = {"TITLE": "<!--SCRIPTS-->", "SCRIPTS": "alert()"}
    assert fill("<!--TITLE-->", parts) == "<!--SCRIPTS-->"

"""Writes a study as one HTML file, which opens from disk without a network or this project.

    write_report(ReportConfig(study, output))

`write` puts the file together, `first_view` collects the claims and plots, and `offline_page` packs
everything into one file. Cards are stored as compressed chunks, which the page unpacks when one is
opened, so that the first view opens as fast for a large study as for a small one.
"""

from topk_megatron.web.report.write import ReportConfig, write_report

__all__ = ["ReportConfig", "write_report"]

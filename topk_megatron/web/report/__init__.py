"""A study as one HTML file that opens from disk, without a network and without this project.

    write_report(study, output)

`measures` are the numbers to search and sort by, `cards` what is known of each neuron, `summary`
the claims and plots, `page` puts them into one file. Cards are kept as compressed chunks that the
page unpacks when one is opened, so the size of a study does not slow the first view down.
"""

from topk_megatron.web.report.build import ReportConfig, write_report

__all__ = ["ReportConfig", "write_report"]

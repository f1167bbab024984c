"""A local web app that shows the neurons of one TopK model while it reads and writes.

`engine` answers requests with the model, `parsing` checks what a request contains, `security`
checks who sent it, and `app` puts them behind addresses. The page is plain HTML, CSS and
JavaScript.
"""

"""A local web app to look into one TopK model while it reads and writes.

`engine` does what a request asks of the model, `requests` checks what came, `security` who asks,
`app` puts them behind addresses. The page is plain HTML, CSS and JavaScript in static/.
"""

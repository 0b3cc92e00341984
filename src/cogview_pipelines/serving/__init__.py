"""A server for one model: an HTTP API and a page. Needs the extra `serve`."""

"""The parts of a report that one can hover, zoom, filter and sort: page.py builds the page, each other file one figure."""

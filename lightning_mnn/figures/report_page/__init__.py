"""``report.html``: the results of a sweep or a run as one page, which needs neither a network nor other files."""

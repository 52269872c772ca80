"""``report.html``: the results of a sweep or a run as one page, which needs neither a network nor other files.

Its figures are drawn as SVG by a script of its own, of 30 kB. A library such as Plotly would add 4.5 MB to each page,
and a dependency, for curves, bands, dots and bars.
"""

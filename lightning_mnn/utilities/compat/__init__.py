"""The only place that uses private or undocumented parts of other libraries, with one module for each library.

Each function names the part that it uses. If that part is missing, the function falls back on a public one, or raises
:class:`~lightning_mnn.utilities.compat.missing.MissingPartError`.
"""

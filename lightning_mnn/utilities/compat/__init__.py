"""The only place that uses private or undocumented parts of other libraries, a module for each library.

Each function says which part it uses. Where that is missing, it falls back on something public, or raises
:class:`~lightning_mnn.utilities.compat.missing.MissingPartError`.
"""

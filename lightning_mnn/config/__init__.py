"""The configuration: types of its values, objects built from it, and what is wrong with it."""

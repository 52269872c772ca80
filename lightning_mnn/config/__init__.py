"""The configuration: the types of its values, the objects built from it, and the errors in it."""

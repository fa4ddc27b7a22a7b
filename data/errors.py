"""The one kind of error that a user's data or request can cause in `data`."""


class DataError(ValueError):
  """Bad or missing data; the message is one line: what, where, what to do."""

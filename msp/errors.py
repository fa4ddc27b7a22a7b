class UserError(ValueError):
  """A mistake of the user's: one line that says what, where and what to do.

  `launch.py` prints the line and exits with 1; every other exception keeps its
  traceback, because it is a defect of this program.
  """

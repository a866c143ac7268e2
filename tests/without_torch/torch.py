"""As in an environment without PyTorch, though `importlib.util.find_spec` finds this module; see `tests.commands`."""

raise ModuleNotFoundError("No module named 'torch'", name="torch")

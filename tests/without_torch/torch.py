"""As in an environment without PyTorch; see `tests.commands`."""

raise ImportError("commands of the tests run without PyTorch")

"""One file a command, named by the command: its arguments (``add_arguments``) and its work (``run``)."""

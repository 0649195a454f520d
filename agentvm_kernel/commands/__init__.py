"""The commands of `agentvm`, a module each.

Every module has NAME and HELP, `add_arguments(parser)` and `execute(options) -> int` (the exit code). They are all
imported to show the help, so each imports what it needs only when it is executed.
"""

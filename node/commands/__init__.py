"""The commands: each module has HELP, add_arguments(parser) and run(arguments) -> exit status."""

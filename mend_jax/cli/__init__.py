"""The user interface: the command line, the allowed values of a config, messages for user errors."""

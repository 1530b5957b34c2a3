"""What the command line runs: a module for each group of commands."""

"""The command line: parsing, composing settings, help, the terminal."""

"""The `doccls demo` command, and the document pages it draws."""

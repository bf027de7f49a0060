"""One module a command that pip brings, and the arguments they share. May import everything; nothing imports it."""
